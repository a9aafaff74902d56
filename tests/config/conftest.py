from published_models import models  # noqa: F401
