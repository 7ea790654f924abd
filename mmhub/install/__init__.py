"""Change the plugins of this Python environment, so that what others need stays as it is and every step can be undone.

`environment` reads what is installed (`places` says where, `hold` keeps others away), `request` what was asked for,
`tools` drive uv or pip, `plan` says what would change, `journal` changes it by `moves` and can take it back, `lock`
writes it down. Nothing here imports a plugin or torch.
"""
