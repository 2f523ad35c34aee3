//! Logs: structured, on standard error, level and form from the settings.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use std::sync::OnceLock;

use crate::config::{Config, LogFormat};
use crate::error::Error;

/// Starts logging for the whole process. `SLEDGE_LOG` goes before `log.level`; empty counts as not set.
///
/// # Errors
/// [`Error::Usage`] or [`Error::Config`] for a level that is none.
pub fn start(config: &Config) -> Result<(), Error> {
    let (targets, level) = reload::Layer::new(targets(config)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match config.log.format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // A second start in one process (a test, or a program that embeds this crate) keeps the first.
    if tracing_subscriber::registry().with(lines.with_filter(targets)).try_init().is_ok() {
        let _ = LEVEL.set(level);
    }
    Ok(())
}

/// The level in force, to be changed by a reload.
static LEVEL: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Puts the level of other settings in force.
///
/// # Errors
/// As [`start`]; the old level stays then.
pub fn change_level(config: &Config) -> Result<(), Error> {
    let targets = targets(config)?;
    if let Some(level) = LEVEL.get() {
        // It fails only where logging has ended, at the end of the process.
        let _ = level.reload(targets);
    }
    Ok(())
}

fn targets(config: &Config) -> Result<Targets, Error> {
    let from_env = std::env::var("SLEDGE_LOG").ok().filter(|level| !level.is_empty());
    match from_env {
        Some(level) => parse_level(&level).map_err(|problem| Error::Usage(format!("SLEDGE_LOG: {problem}"))),
        None => Ok(parse_level(&config.log.level).map_err(|problem| config.refuse("log.level", problem))?),
    }
}

/// Reads `info` or `info,sledge=debug`. Stricter than tracing, which takes a misspelt level for a module's name and
/// then logs nothing else, and an empty one for `error`.
fn parse_level(text: &str) -> Result<Targets, String> {
    let level = |text: &str| match text.trim() {
        "off" => Ok(LevelFilter::OFF),
        "error" => Ok(LevelFilter::ERROR),
        "warn" => Ok(LevelFilter::WARN),
        "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "trace" => Ok(LevelFilter::TRACE),
        other => Err(format!("`{other}` is no log level; there are off, error, warn, info, debug and trace")),
    };
    text.split(',').try_fold(Targets::new(), |targets, part| match part.split_once('=') {
        Some((module, text)) => Ok(targets.with_target(module.trim(), level(text)?)),
        None => Ok(targets.with_default(level(part)?)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tracing::Level;

    use super::*;

    /// A level alone, and one by module.
    #[test]
    fn levels_are_read_for_all_and_by_module() {
        let targets = parse_level("warn, sledge::store=debug").unwrap();
        assert!(targets.would_enable("hyper", &Level::WARN));
        assert!(!targets.would_enable("hyper", &Level::INFO));
        assert!(targets.would_enable("sledge::store", &Level::DEBUG));
        assert!(!parse_level("off").unwrap().would_enable("sledge", &Level::ERROR));
    }

    /// A misspelt level is an error, not the name of a module.
    #[test]
    fn a_misspelt_level_is_refused() {
        for text in ["inof", "info,sledge=loud", "", "info,"] {
            assert!(parse_level(text).is_err(), "{text}");
        }
    }
}
