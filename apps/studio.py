"""The Studio for hosts that run a script: `gradio apps/studio.py`, a Space, or `python apps/studio.py`.

Settings come from the environment: VGM_BASE, VGM_LIBRARY, VGM_HOST and VGM_AUTH (USER:PASSWORD), PORT, SPACE_HOST.
"""

from vgm_peft.studio.app import build, settings_of_environment

studio = build(settings_of_environment())
demo = studio.page

if __name__ == "__main__":
    studio.launch()
