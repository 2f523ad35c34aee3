//! Settings that stay on this device: a small JSON file in the profile, private.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::store::StoreError;
use crate::store::dir::sync_dir;
use crate::store::log::io_at;

/// The settings of one device.
#[derive(Debug)]
pub struct LocalSettings {
    file: PathBuf,
    all: BTreeMap<String, Value>,
}

impl LocalSettings {
    /// Reads the settings of a profile; none where there is no file.
    ///
    /// # Errors
    /// When the system refuses, or the file holds something else.
    pub fn open(dir: &Path) -> Result<LocalSettings, StoreError> {
        let file = dir.join("local.json");
        let all = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| StoreError::Damaged(format!("{}: {error}", file.display())))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(io_at("read", &file)(error)),
        };
        Ok(LocalSettings { file, all })
    }

    /// Writes a setting, durably; null removes it.
    ///
    /// # Errors
    /// When the system refuses; the file is as before then.
    pub fn set(&mut self, name: &str, value: Value) -> Result<(), StoreError> {
        if value.is_null() {
            self.all.remove(name);
        } else {
            self.all.insert(name.to_owned(), value);
        }
        let new = self.file.with_extension("new");
        let write = || -> std::io::Result<()> {
            // One that a crash left behind would keep its mode.
            let _ = fs::remove_file(&new);
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let mut file = options.open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(&self.all).expect("a map with string keys"))?;
            file.sync_all()?;
            fs::rename(&new, &self.file)
        };
        write().map_err(io_at("write", &self.file))?;
        sync_dir(self.file.parent().unwrap_or(Path::new(".")))
    }

    /// All of them.
    pub fn into_all(self) -> BTreeMap<String, Value> {
        self.all
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    /// Written, changed, removed, and there at the next start; somebody else's file is left alone.
    #[test]
    fn settings_of_the_device_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name, value| LocalSettings::open(dir.path()).unwrap().set(name, value).unwrap();
        set("device.font", json!(12));
        set("device.theme", json!("dark"));
        set("device.font", Value::Null);
        let all = LocalSettings::open(dir.path()).unwrap().into_all();
        assert_eq!(all, BTreeMap::from([("device.theme".to_owned(), json!("dark"))]));
        fs::write(dir.path().join("local.json"), "my diary").unwrap();
        assert!(LocalSettings::open(dir.path()).is_err());
    }
}
