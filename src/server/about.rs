//! What the relay tells about itself: the relay information document (NIP-11) and the page for browsers.

use crate::config::Config;
use crate::protocol::relay_info::{Limitation, RelayInfo, SyncInfo};
use crate::protocol::subscription::SUBSCRIPTION_ID_CHARS_MAX;
use crate::relay::policy::Policy;

/// NIPs that the relay implements; those that only concern clients are not listed.
const SUPPORTED_NIPS: [u16; 15] = [1, 2, 9, 11, 13, 17, 40, 42, 45, 56, 59, 62, 67, 70, 77];

/// With those that depend on the settings: members (43), and management from afar (86, 98).
fn supported_nips(policy: &Policy) -> Vec<u16> {
    let mut nips = SUPPORTED_NIPS.to_vec();
    nips.extend(policy.relay_key().map(|_| 43));
    nips.extend(policy.has_admins().then_some([86, 98]).into_iter().flatten());
    nips.sort_unstable();
    nips
}

/// The relay information document for these settings and what admins have decided.
pub fn relay_info(config: &Config, policy: &Policy) -> RelayInfo {
    let info = &config.info;
    let decided = policy.decided();
    RelayInfo {
        name: decided.name.as_ref().unwrap_or(&info.name).clone(),
        description: decided.description.as_ref().unwrap_or(&info.description).clone(),
        banner: info.banner.clone(),
        icon: decided.icon.as_ref().unwrap_or(&info.icon).clone(),
        pubkey: info.pubkey.clone(),
        contact: info.contact.clone(),
        relay_key: policy.relay_key(),
        supported_nips: supported_nips(policy),
        software: env!("CARGO_PKG_REPOSITORY").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        terms_of_service: info.terms_of_service.clone(),
        limitation: limitation(config, policy),
        sync: SyncInfo { slots: 1 },
    }
}

fn limitation(config: &Config, policy: &Policy) -> Limitation {
    let Config { limits, access, .. } = config;
    let behind_secs = limits.created_at_behind_secs_max;
    Limitation {
        max_message_length: limits.frame_bytes_max as u64,
        max_subscriptions: limits.subscriptions_max as u64,
        max_limit: limits.limit_max as u64,
        max_subid_length: SUBSCRIPTION_ID_CHARS_MAX as u64,
        max_event_tags: limits.event_tags_max as u64,
        max_content_length: limits.content_chars_max as u64,
        min_pow_difficulty: access.pow_min,
        auth_required: access.auth_required_to_read && access.auth_required_to_write,
        payment_required: false,
        restricted_writes: access.pow_min > 0 || access.auth_required_to_write || policy.restricts_writes(),
        created_at_lower_limit: (behind_secs > 0).then_some(behind_secs),
        created_at_upper_limit: Some(limits.created_at_ahead_secs_max),
        default_limit: limits.limit_default as u64,
    }
}

/// The page for browsers. `url` is the WebSocket address under which the browser reached the relay.
pub fn page(info: &RelayInfo, url: &str) -> String {
    let name = if info.name.is_empty() { "Nostr relay" } else { &info.name };
    let description: String = info
        .description
        .split("\n\n")
        .filter(|paragraph| !paragraph.trim().is_empty())
        .map(|paragraph| format!("<p>{}</p>", escape(paragraph)))
        .collect();
    let nips: String = info
        .supported_nips
        .iter()
        .map(|nip| format!("<a href=\"https://github.com/nostr-protocol/nips/blob/master/{nip:02}.md\">{nip}</a> "))
        .collect();
    let contact = row("Contact", &link(&info.contact));
    let terms = row("Terms", &link(&info.terms_of_service));
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{name}</title><style>{STYLE}</style></head><body><main>\
         <h1>{name}</h1>{description}\
         <p>This is a <a href=\"https://nostr.com\">Nostr</a> relay. Add this address to your Nostr client:</p>\
         <p><code>{url}</code></p>\
         <dl>{contact}{terms}<dt>Protocol</dt><dd>NIP {nips}</dd><dt>Software</dt><dd>sledge {version}</dd></dl>\
         </main></body></html>\n",
        name = escape(name),
        url = escape(url),
        version = escape(&info.version),
    )
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5b6876;--back:#f6f7f9;--card:#fff;--line:#dfe4ea;--link:#6d3fc0}\
@media(prefers-color-scheme:dark){:root{--ink:#e7ebf0;--soft:#9aa7b4;--back:#12161b;--card:#1b2128;--line:#2c353f;--link:#b79af0}}\
*{box-sizing:border-box}\
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:1.5rem;background:var(--back);color:var(--ink);\
font:1rem/1.55 system-ui,sans-serif}\
main{width:100%;max-width:38rem;background:var(--card);border:1px solid var(--line);border-radius:14px;\
padding:clamp(1.25rem,5vw,2.5rem);overflow-wrap:anywhere}\
h1{margin:0 0 .75rem;font-size:1.6rem;line-height:1.2}a{color:var(--link)}\
code{display:block;padding:.7rem .9rem;border:1px solid var(--line);border-radius:8px;background:var(--back);\
font:.95rem ui-monospace,monospace;user-select:all}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.25rem;margin:1.5rem 0 0;font-size:.9rem}\
dt{color:var(--soft)}dd{margin:0}";

fn row(title: &str, value: &str) -> String {
    if value.is_empty() { String::new() } else { format!("<dt>{title}</dt><dd>{value}</dd>") }
}

/// A link where the text is one that a browser may follow, else the text.
fn link(uri: &str) -> String {
    let safe = ["https://", "http://", "mailto:"].iter().any(|scheme| uri.starts_with(scheme));
    let text = escape(uri);
    if safe { format!("<a href=\"{text}\" rel=\"noreferrer\">{text}</a>") } else { text }
}

fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::store::memory::MemoryStore;

    fn info(config: &Config) -> RelayInfo {
        let policy = Policy::open(Arc::new(config.clone()), Arc::new(MemoryStore::new())).unwrap();
        relay_info(config, &policy)
    }

    /// The document mirrors the limits, leaves empty texts out and names no bound where there is none.
    #[test]
    fn the_document_mirrors_the_settings() {
        let mut config = Config::default();
        config.info.name = "mine".to_owned();
        let json = |config: &Config| serde_json::to_value(info(config)).unwrap();
        let document = json(&config);
        assert_eq!(document["name"], "mine");
        assert_eq!(document["supported_nips"][0], 1);
        assert_eq!(document["limitation"]["max_message_length"], config.limits.frame_bytes_max);
        assert_eq!(document["limitation"]["default_limit"], config.limits.limit_default);
        assert_eq!(document["limitation"].get("created_at_lower_limit"), None);
        assert_eq!(document.get("icon"), None);
        config.limits.created_at_behind_secs_max = 5;
        assert_eq!(json(&config)["limitation"]["created_at_lower_limit"], 5);
    }

    /// Nothing that an operator or a Host header says becomes markup, and no script becomes a link.
    #[test]
    fn texts_do_not_become_markup() {
        let mut config = Config::default();
        config.info.name = "<b>&\"'".to_owned();
        config.info.description = "one\n\n<script>two".to_owned();
        config.info.contact = "javascript:alert(1)".to_owned();
        let page = page(&info(&config), "ws://<i>");
        assert!(page.contains("<h1>&lt;b&gt;&amp;&quot;&#39;</h1>"));
        assert!(page.contains("<p>one</p><p>&lt;script&gt;two</p>"));
        assert!(page.contains("<code>ws://&lt;i&gt;</code>"));
        assert!(!page.contains("href=\"javascript"));
    }
}
