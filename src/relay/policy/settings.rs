//! The keys of the settings, read once: who administers, who is listed, who is denied, where trust begins.

use std::collections::HashSet;

use crate::config::Config;
use crate::protocol::PublicKey;
use crate::protocol::nip19::{KeyError, parse_pubkey};

/// The keys that `sync.toml` names.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `info.pubkey` and `access.admins`.
    pub admins: HashSet<PublicKey>,
    /// `access.allow_keys`.
    pub allow_keys: HashSet<PublicKey>,
    /// `access.deny_keys`.
    pub deny_keys: HashSet<PublicKey>,
    /// `trust.roots`.
    pub trust_roots: Vec<PublicKey>,
}

/// A key of the settings that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("`{text}`: {problem}")]
pub struct WrongKey {
    /// The setting, `access.admins`.
    pub setting: &'static str,
    /// What stands there.
    pub text: String,
    /// What is wrong with it.
    pub problem: KeyError,
}

impl Settings {
    /// Reads the keys, each an npub, nprofile or hex.
    ///
    /// # Errors
    /// The first that is none.
    pub fn new(config: &Config) -> Result<Settings, WrongKey> {
        let access = &config.access;
        let mut admins: HashSet<PublicKey> = keys("access.admins", &access.admins)?;
        if !config.info.pubkey.is_empty() {
            admins.insert(key("info.pubkey", &config.info.pubkey)?);
        }
        Ok(Settings {
            admins,
            allow_keys: keys("access.allow_keys", &access.allow_keys)?,
            deny_keys: keys("access.deny_keys", &access.deny_keys)?,
            trust_roots: keys("trust.roots", &config.trust.roots)?,
        })
    }
}

fn keys<C: FromIterator<PublicKey>>(setting: &'static str, texts: &[String]) -> Result<C, WrongKey> {
    texts.iter().map(|text| key(setting, text)).collect()
}

fn key(setting: &'static str, text: &str) -> Result<PublicKey, WrongKey> {
    parse_pubkey(text).map(PublicKey).map_err(|problem| WrongKey { setting, text: text.to_owned(), problem })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// npub and hex are the same key, the operator is an admin, and a wrong key is named with its setting.
    #[test]
    fn keys_are_read_in_any_spelling() {
        let npub = "npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg";
        let hex = "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e";
        let mut config = Config::default();
        config.info.pubkey = "11".repeat(32);
        config.access.admins = vec![npub.to_owned(), hex.to_owned()];
        config.trust.roots = vec![hex.to_uppercase()];
        let settings = Settings::new(&config).unwrap();
        assert_eq!(settings.admins.len(), 2);
        assert_eq!(settings.trust_roots, [PublicKey::from_hex(hex).unwrap()]);
        config.access.deny_keys = vec!["npub1".to_owned()];
        let wrong = Settings::new(&config).unwrap_err();
        assert_eq!((wrong.setting, wrong.text.as_str()), ("access.deny_keys", "npub1"));
    }
}
