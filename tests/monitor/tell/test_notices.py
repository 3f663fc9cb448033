"""What an operator reads of settings that are not in force."""

from __future__ import annotations

import pytest

import settings as settings_module
from monitor.tell import notices


@pytest.mark.parametrize(("language", "invalid"), [("en", "The settings in .env are invalid"), ("zh", ".env 中的设置有误")])
def test_an_unknown_setting_is_named_without_all_that_exist(tmp_path, monkeypatch, language, invalid):
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / ".env")
    (tmp_path / ".env").write_text("GLM_API_PROT=8080\n")
    with pytest.raises(settings_module.SettingsError) as error:
        settings_module.load()

    told = notices.settings_fallback(str(error.value))[language]

    assert invalid in told and "GLM_API_PROT: no such setting. Did you mean GLM_API_PORT?" in told
    assert "GLM_QUEUE_SIZE" not in told and len(told) < 300
