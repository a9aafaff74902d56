from sculpt_dist.cli.main import main

main()
