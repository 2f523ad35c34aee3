//! The settings in force, which a reload replaces while the relay serves.
//!
//! Only what is listed here as reloadable changes; the rest keeps its value until the next start, so that no two parts
//! of a relay ever go by different files.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{Config, ConfigError, read};

/// Sections and keys that take effect without a restart. Limits of [`Config::limits`] that a connection or a thread was
/// made with hold for connections that are made afterwards.
const RELOADABLE: [&str; 8] =
    ["service_url", "mirror", "log.level", "info", "limits", "access", "rate", "operation.slow_query_ms"];

/// Keys in those sections that nevertheless need one: threads, and live delivery, are made with them.
const NOT_RELOADABLE: [&str; 4] =
    ["limits.query_threads", "limits.query_slice_ms", "limits.query_time_ms_max", "access.private_kinds"];

/// A handle to the settings in force. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Live(Arc<ArcSwap<Config>>);

/// What came of comparing a new file with the settings in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Reloaded {
    /// The settings in force from now on.
    pub config: Config,
    /// Keys that have changed and are in force.
    pub applied: Vec<String>,
    /// Keys that have changed and need a restart.
    pub needs_restart: Vec<String>,
}

impl From<Arc<Config>> for Live {
    fn from(config: Arc<Config>) -> Live {
        Live(Arc::new(ArcSwap::new(config)))
    }
}

impl Live {
    /// The settings in force now. Keep them only for the length of one decision.
    pub fn load(&self) -> Arc<Config> {
        self.0.load_full()
    }

    /// Puts other settings in force.
    pub fn replace(&self, config: Config) {
        self.0.store(Arc::new(config));
    }
}

/// Takes from `wanted` what can be changed while the relay of `current` runs.
///
/// # Errors
/// [`ConfigError`] when what can be changed does not go together with what cannot.
pub fn reload(current: &Config, wanted: &Config) -> Result<Reloaded, ConfigError> {
    let (mut in_force, wanted_table) = (table_of(current), table_of(wanted));
    let (mut applied, mut needs_restart) = (Vec::new(), Vec::new());
    merge(&mut in_force, &wanted_table, "", &mut applied, &mut needs_restart);
    let mut config = read::parse(&in_force.to_string(), None)?;
    config.origin = wanted.origin.clone();
    super::check::check(&config)?;
    Ok(Reloaded { config, applied, needs_restart })
}

/// By way of text, as all settings come, so that they need no serialiser for another form.
fn table_of(config: &Config) -> toml::Table {
    let text = toml::to_string(config).expect("settings are numbers, texts and lists");
    text.parse().expect("what was written as TOML is TOML")
}

/// Copies reloadable values of `wanted` into `table` and sorts the names of what differs. A key that one of the two leaves
/// out (an optional one) differs too.
fn merge(
    table: &mut toml::Table,
    wanted: &toml::Table,
    prefix: &str,
    applied: &mut Vec<String>,
    needs_restart: &mut Vec<String>,
) {
    let names: std::collections::BTreeSet<String> = table.keys().chain(wanted.keys()).cloned().collect();
    for name in names {
        let key = format!("{prefix}{name}");
        if let (Some(toml::Value::Table(section)), Some(toml::Value::Table(other))) =
            (table.get_mut(&name), wanted.get(&name))
        {
            merge(section, other, &format!("{key}."), applied, needs_restart);
        } else if table.get(&name) != wanted.get(&name) {
            if is_reloadable(&key) {
                match wanted.get(&name) {
                    Some(value) => drop(table.insert(name, value.clone())),
                    None => drop(table.remove(&name)),
                }
                applied.push(key);
            } else {
                needs_restart.push(key);
            }
        }
    }
}

fn is_reloadable(key: &str) -> bool {
    let is_in = |list: &[&str]| {
        list.iter().any(|entry| key.strip_prefix(entry).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    };
    is_in(&RELOADABLE) && !is_in(&NOT_RELOADABLE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(text: &str) -> Config {
        Config::parse(text, None).unwrap()
    }

    /// What can change does, what cannot keeps its old value and is named.
    #[test]
    fn a_reload_takes_what_it_can() {
        let current = parse("[info]\nname = \"old\"\n[memory]\nbudget_mb = 64\n");
        let wanted = parse(
            "listen = \"127.0.0.1:1\"\n[info]\nname = \"new\"\n[limits]\nlimit_max = 900\nquery_threads = 3\n[rate]\n\
             exempt_ips = [\"10.0.0.0/8\"]\n[memory]\nbudget_mb = 128\n",
        );
        let reloaded = reload(&current, &wanted).unwrap();
        assert_eq!(reloaded.applied, ["info.name", "limits.limit_max", "rate.exempt_ips"]);
        assert_eq!(reloaded.needs_restart, ["limits.query_threads", "listen", "memory.budget_mb"]);
        assert_eq!((reloaded.config.info.name.as_str(), reloaded.config.limits.limit_max), ("new", 900));
        assert_eq!((reloaded.config.listen, reloaded.config.memory.budget_mb), (current.listen, 64));
        assert_eq!(reloaded.config.rate, wanted.rate);
    }

    /// The same file changes nothing.
    #[test]
    fn the_same_settings_change_nothing() {
        let current = parse("[[retention.rules]]\nkinds = [7, \"10-20\"]\n");
        let reloaded = reload(&current, &current.clone()).unwrap();
        assert_eq!((reloaded.applied, reloaded.needs_restart), (vec![], vec![]));
        assert_eq!(reloaded.config, current);
    }

    /// Two values that are each good but not beside an old one that stays are refused, naming the new one.
    #[test]
    fn values_that_do_not_go_with_what_stays_are_refused() {
        let current = parse("");
        let wanted = parse(
            "[limits]\nframe_bytes_max = 8_000_000\nlive_queue_bytes_max = 16_000_000\n[storage]\nwriter_queue_bytes_max = 32_000_000\n",
        );
        assert!(reload(&current, &wanted).is_ok(), "the old writer queue still holds it");
        let wanted = parse(
            "[limits]\nframe_bytes_max = 8_000_000\nlive_queue_bytes_max = 16_000_000\n[storage]\nwriter_queue_bytes_max = 8_000_000\n",
        );
        let mut small = current;
        small.storage.writer_queue_bytes_max = 1_000_000;
        let error = reload(&small, &wanted).unwrap_err().to_string();
        assert!(error.contains("limits.frame_bytes_max"), "{error}");
    }

    /// Every reloadable section exists, so a renamed one is noticed.
    #[test]
    fn the_lists_name_settings_that_exist() {
        let table = table_of(&Config::default());
        for key in RELOADABLE.iter().chain(&NOT_RELOADABLE) {
            let found =
                key.split('.').try_fold(toml::Value::Table(table.clone()), |value, part| value.get(part).cloned());
            assert!(found.is_some(), "{key}");
        }
    }
}
