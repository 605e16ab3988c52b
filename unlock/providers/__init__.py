# SPDX-License-Identifier: Apache-2.0
"""Where keys come from: one file a provider."""
