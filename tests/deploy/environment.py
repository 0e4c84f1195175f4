"""What a deployment's environment variables come to. Knows the settings, not where the variables were read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from service.config import ENV_PREFIX, Settings, load_settings


def quire_settings(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Resolves the variables as a server would. A name that no setting has would be ignored by one: it fails here."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert set(variables) <= known
    for name in known:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings({})
