from sculpt_dist.cli import main

main()
