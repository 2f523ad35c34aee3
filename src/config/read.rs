//! From the text of a settings file to [`Config`], with the line and key of whatever is wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::{Config, DEFAULTS};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is named or exists, but cannot be read.
    #[error("cannot read the settings file {}: {source}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file says something that does not hold.
    #[error("{}", invalid_text(file.as_deref(), *line, key.as_deref(), problem))]
    Invalid {
        /// The file; none for the built-in settings.
        file: Option<PathBuf>,
        /// The line, from 1; none when the file does not set the key.
        line: Option<usize>,
        /// The key with its section, `limits.limit_max`; none for broken syntax.
        key: Option<String>,
        /// What is wrong with it.
        problem: String,
    },
}

fn invalid_text(file: Option<&Path>, line: Option<usize>, key: Option<&str>, problem: &str) -> String {
    let mut text = match file {
        Some(file) => file.display().to_string(),
        None => "built-in settings".to_owned(),
    };
    if let Some(line) = line {
        text += &format!(":{line}");
    }
    text += ": ";
    if let Some(key) = key {
        text += &format!("{key}: ");
    }
    text + problem
}

/// Where settings were read: the file, and the line of each key that it sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The file; none for the built-in settings.
    pub file: Option<PathBuf>,
    lines: BTreeMap<String, usize>,
}

impl Origin {
    /// The line, from 1, on which the file sets this key (`"limits.limit_max"`).
    pub fn line(&self, key: &str) -> Option<usize> {
        self.lines.get(key).copied()
    }

    pub(super) fn refuse(&self, key: Option<&str>, problem: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            file: self.file.clone(),
            line: key.and_then(|key| self.line(key)),
            key: key.map(str::to_owned),
            problem: problem.into(),
        }
    }
}

/// The file to read: what the user named, else the first usual place where there is one, else none. An empty
/// environment variable is as good as none.
pub(super) fn locate(
    flag: Option<&Path>,
    from_env: Option<PathBuf>,
    exists: impl Fn(&Path) -> bool,
) -> Option<PathBuf> {
    let usual = ["sync.toml", "/etc/sledge/sync.toml"].map(Path::new);
    flag.map(Path::to_owned)
        .or(from_env.filter(|file| !file.as_os_str().is_empty()))
        .or_else(|| usual.into_iter().find(|file| exists(file)).map(Path::to_owned))
}

/// Reads `text` over the defaults. The values' ranges are not looked at yet.
pub(super) fn parse(text: &str, file: Option<&Path>) -> Result<Config, ConfigError> {
    let mut origin = Origin { file: file.map(Path::to_owned), lines: BTreeMap::new() };
    let spanned = DeTable::parse(text).map_err(|error| ConfigError::Invalid {
        file: origin.file.clone(),
        line: error.span().map(|span| line_at(text, span.start)),
        key: None,
        problem: error.message().to_owned(),
    })?;
    let mut keys = Vec::new();
    list_keys(spanned.get_ref(), "", &mut keys);
    origin.lines = keys.iter().map(|(offset, key)| (key.clone(), line_at(text, *offset))).collect();

    let set = plain(spanned);
    let defaults = plain(DeTable::parse(DEFAULTS).expect("the built-in sync.toml is TOML: a test reads it"));
    let mut all = set.clone();
    fill_in(&mut all, &defaults, "", &origin)?;
    let mut config = typed(&all).map_err(|problem| wrong_value(problem, &keys, &set, &defaults, &origin))?;
    config.origin = origin;
    Ok(config)
}

/// The table without its spans.
fn plain(table: Spanned<DeTable<'_>>) -> Table {
    Table::deserialize(toml::Deserializer::from(table)).expect("any TOML is a table of values")
}

/// The settings of a whole table. By way of JSON's values, whose deserialiser is in the binary anyway: that of TOML
/// would be another 0.2 MB of it.
fn typed(table: &Table) -> Result<Config, String> {
    let values = serde_json::to_value(table).map_err(|error| error.to_string())?;
    Config::deserialize(values).map_err(|error| error.to_string())
}

/// Collects the offset and full name of every key, sections included.
fn list_keys(table: &DeTable<'_>, prefix: &str, places: &mut Vec<(usize, String)>) {
    for (name, value) in table {
        let key = format!("{prefix}{}", name.get_ref());
        if let DeValue::Table(section) = value.get_ref() {
            list_keys(section, &format!("{key}."), places);
        }
        places.push((name.span().start, key));
    }
}

/// Gives `table` the keys of `defaults` that it lacks, once all it has are known and of the right type. Merging before
/// deserialising keeps one source of defaults.
fn fill_in(table: &mut Table, defaults: &Table, prefix: &str, origin: &Origin) -> Result<(), ConfigError> {
    for (name, value) in table.iter_mut() {
        let key = format!("{prefix}{name}");
        let Some(default) = defaults.get(name) else {
            let problem = "no such setting (`sledge config show --defaults` lists all)";
            return Err(origin.refuse(Some(&key), problem));
        };
        if !value.same_type(default) {
            let problem = format!("must be of type {}, not {}", default.type_str(), value.type_str());
            return Err(origin.refuse(Some(&key), problem));
        }
        if let (Value::Table(section), Value::Table(default)) = (value, default) {
            fill_in(section, default, &format!("{key}."), origin)?;
        }
    }
    for (name, default) in defaults {
        if !table.contains_key(name) {
            table.insert(name.clone(), default.clone());
        }
    }
    Ok(())
}

/// The error for a value of the right TOML type that its setting cannot take: the first of the user's, in the order of
/// the file, that does not go with defaults for all others.
fn wrong_value(
    problem: String,
    keys: &[(usize, String)],
    set: &Table,
    defaults: &Table,
    origin: &Origin,
) -> ConfigError {
    let mut in_order: Vec<&(usize, String)> = keys.iter().collect();
    in_order.sort_unstable();
    for (_, key) in in_order {
        if let Some(problem) = alone(key, set, defaults).and_then(|table| typed(&table).err()) {
            return origin.refuse(Some(key), problem);
        }
    }
    origin.refuse(None, problem)
}

/// The defaults with the one setting `key` of `set`; none for a section.
fn alone(key: &str, set: &Table, defaults: &Table) -> Option<Table> {
    let (section, name) = key.rsplit_once('.').map_or((None, key), |(section, name)| (Some(section), name));
    let mut all = defaults.clone();
    let (mut from, mut to) = (set, &mut all);
    for part in section.into_iter().flat_map(|section| section.split('.')) {
        from = from.get(part)?.as_table()?;
        to = to.get_mut(part)?.as_table_mut()?;
    }
    let value = from.get(name).filter(|value| !value.is_table())?;
    to.insert(name.to_owned(), value.clone());
    Some(all)
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn error_of(text: &str) -> String {
        let file = Path::new("my.toml");
        Config::parse(text, Some(file)).unwrap_err().to_string()
    }

    /// Whatever is wrong, the message starts with file, line and key.
    #[test]
    fn errors_name_file_line_and_key() {
        for (text, expected) in [
            (
                "store = \"x\"\nstoer = \"y\"\n",
                "my.toml:2: stoer: no such setting (`sledge config show --defaults` lists all)",
            ),
            (
                "[limits]\n\nlimit_mx = 5\n",
                "my.toml:3: limits.limit_mx: no such setting (`sledge config show --defaults` lists all)",
            ),
            ("[limit]\n", "my.toml:1: limit: no such setting (`sledge config show --defaults` lists all)"),
            ("[limits]\nlimit_max = \"many\"\n", "my.toml:2: limits.limit_max: must be of type integer, not string"),
            ("limits = 5\n", "my.toml:1: limits: must be of type table, not integer"),
            (
                "limits = { filters_max = 1, limit_max = 1.5 }\n",
                "my.toml:1: limits.limit_max: must be of type integer, not float",
            ),
            ("listen = \"localhost\"\n", "my.toml:1: listen: invalid socket address syntax"),
            ("[log]\nformat = \"xml\"\n", "my.toml:2: log.format: unknown variant `xml`, expected `text` or `json`"),
            (
                "[storage]\nindex = \"lmdb\"\n",
                "my.toml:2: storage.index: unknown variant `lmdb`, expected `sled` or `fjall`",
            ),
            (
                "[limits]\ntrusted_proxies = [\n  \"::1\",\n  \"here\",\n]\n",
                "my.toml:2: limits.trusted_proxies: `here` is neither an IP address nor a range such as 10.0.0.0/8",
            ),
            (
                "limits = { filters_max = 1, limit_max = -1 }\n",
                "my.toml:1: limits.limit_max: invalid value: integer `-1`, expected usize",
            ),
        ] {
            assert_eq!(error_of(text), expected, "{text}");
        }
    }

    /// Broken syntax has no key, but a line.
    #[test]
    fn broken_syntax_names_file_and_line() {
        let error = error_of("store = \"x\"\nlisten = \n");
        assert!(error.starts_with("my.toml:2: "), "{error}");
        let twice = error_of("store = \"x\"\nstore = \"y\"\n");
        assert!(twice.starts_with("my.toml:2: duplicate key"), "{twice}");
    }

    /// A file names only what it changes.
    #[test]
    fn keys_a_file_does_not_name_keep_their_defaults() {
        let config = Config::parse("[limits]\nlimit_max = 900\n", Some(Path::new("my.toml"))).unwrap();
        assert_eq!(config.limits.limit_max, 900);
        assert_eq!(config.origin.line("limits.limit_max"), Some(2));
        assert_eq!(config.origin.line("limits.limit_default"), None);
        let mut expected = Config::default();
        expected.limits.limit_max = 900;
        expected.origin = config.origin.clone();
        assert_eq!(config, expected);
        assert_eq!(Config::parse("", None).unwrap().limits, Config::default().limits);
    }

    /// The flag wins over the variable, both over the usual places, even when the named file is missing.
    #[test]
    fn the_first_file_named_or_found_is_read() {
        let flag = Path::new("flag.toml");
        let env = || Some(PathBuf::from("env.toml"));
        let all = |_: &Path| true;
        let none = |_: &Path| false;
        let etc = |file: &Path| file.starts_with("/etc");
        let found = |file: &str| Some(PathBuf::from(file));
        assert_eq!(locate(Some(flag), env(), all), found("flag.toml"));
        assert_eq!(locate(Some(flag), env(), none), found("flag.toml"));
        assert_eq!(locate(None, env(), all), found("env.toml"));
        assert_eq!(locate(None, Some(PathBuf::new()), all), found("sync.toml"));
        assert_eq!(locate(None, None, all), found("sync.toml"));
        assert_eq!(locate(None, None, etc), found("/etc/sledge/sync.toml"));
        assert_eq!(locate(None, None, none), None);
    }

    /// A named file that is not there is an error, never the defaults.
    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("absent.toml");
        let error = Config::load(Some(&file)).unwrap_err().to_string();
        assert!(error.contains("absent.toml"), "{error}");
    }
}
