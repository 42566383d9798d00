"""How the Studio looks: one accent colour, the system's own fonts (so nothing is fetched), light and dark."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

CSS = """
.gradio-container main.fillable { max-width: 1280px !important; margin: 0 auto; padding: 12px 20px 24px !important; }
#title { padding: 2px 4px 0; }
#title h1 { font-size: 1.2rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#title p { color: var(--body-text-color-subdued); margin: 2px 0 0; font-size: .9rem; }
.status { padding: 0 2px; }
.status .line { min-height: 1.4em; font-size: .9rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums }
.status .track { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-top: 6px; overflow: hidden; }
.status .done { height: 100%; border-radius: 3px; background: var(--color-accent); transition: width .25s ease-out; }
.hint { color: var(--body-text-color-subdued); font-size: .9rem; }
.create { display: grid !important; align-items: start; }
.create { grid-template: "asked results" auto "panels results" 1fr / minmax(0, 5fr) minmax(0, 6fr); }
.create .asked { grid-area: asked; }
.create .panels { grid-area: panels; }
.create .results { grid-area: results; position: sticky; top: 8px; }
@media (max-width: 899px) {
  .create { grid-template: "asked" auto "results" auto "panels" auto / minmax(0, 1fr); }
  .create .results { position: static; }
}
#log textarea, #details textarea { font-family: var(--font-mono); font-size: .8rem; line-height: 1.5; }
footer { display: none !important; }
@media (max-width: 520px) { .gradio-container main.fillable { padding: 8px !important; } }
"""

SHORTCUT = """
<script>
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    const button = document.querySelector('#draw');
    if (button && button.offsetParent && !button.disabled) { event.preventDefault(); button.click(); }
  }
});
</script>
"""
"""Ctrl-Enter (or Cmd-Enter) draws."""


SAVE_TEXT = """
(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/toml' }));
  link.download = 'stack.toml';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
"""
"""Hands a text to the browser as a file, which the server never has."""


def theme() -> "gr.themes.Base":
    """The theme; fonts are the system's, since a web font would be an outside request."""
    import gradio as gr

    sans = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    soft = gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="md",
        font=sans,
        font_mono=mono,
    )
    plain = {
        f"block_{kind}_{what}{mode}": value
        for kind in ("label", "title")
        for mode in ("", "_dark")
        for what, value in {
            "background_fill": "*block_background_fill" if kind == "label" else "none",
            "text_color": "*body_text_color",
        }.items()
    }
    return soft.set(
        **plain, block_title_text_weight="600", block_label_text_weight="600", block_title_padding="0",
        block_shadow="none", body_background_fill="*neutral_50", block_border_width="1px", block_border_width_dark="1px",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
    )  # fmt: skip


def bar(fraction: float, line: str) -> str:
    """A line of text over a progress bar, as HTML. The text is escaped."""
    from html import escape

    share = max(0.0, min(1.0, fraction)) * 100
    track = f'<div class="track"><div class="done" style="width:{share:.1f}%"></div></div>' if fraction >= 0 else ""
    return f'<div class="line">{escape(line)}</div>{track}'


def clock(seconds: float) -> str:
    """Spell a duration as people do."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
