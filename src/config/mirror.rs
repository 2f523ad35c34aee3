//! `[[mirror]]`: other relays with which this one is kept equal while it serves.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError};

/// Streams that can be named: each is a link of its own.
const MIRRORS_MAX: usize = 64;
/// Filters of one stream.
const FILTERS_MAX: usize = 64;

/// Which way events go, seen from this relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the other relay to this one.
    #[default]
    Down,
    /// From this relay to the other one.
    Up,
    /// Both.
    Both,
}

impl Direction {
    /// Whether events come here.
    pub fn is_down(self) -> bool {
        self != Direction::Up
    }

    /// Whether events leave here.
    pub fn is_up(self) -> bool {
        self != Direction::Down
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Down => "down",
            Direction::Up => "up",
            Direction::Both => "both",
        })
    }
}

/// One of `[[mirror]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// The other relay.
    pub url: String,
    /// Which way events go.
    #[serde(default)]
    pub direction: Direction,
    /// What is kept equal: filters as JSON. None: everything.
    #[serde(default)]
    pub filters: Vec<String>,
    /// Whether private and protected events go too.
    #[serde(default)]
    pub private: bool,
    /// File with the secret key that is proven to the other relay; empty: none.
    #[serde(default)]
    pub key: String,
}

/// What the type does not say. Whether filters and keys can be read is found out at the start.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    if config.mirror.len() > MIRRORS_MAX {
        return Err(config.refuse("mirror", format!("at most {MIRRORS_MAX}, not {}", config.mirror.len())));
    }
    for mirror in &config.mirror {
        let problem = if !["ws://", "wss://"].iter().any(|scheme| mirror.url.starts_with(scheme)) {
            format!("the url must start with wss:// or ws://, not as in `{}`", mirror.url)
        } else if mirror.filters.len() > FILTERS_MAX {
            format!("at most {FILTERS_MAX} filters for {}", mirror.url)
        } else {
            continue;
        };
        return Err(config.refuse("mirror", problem));
    }
    Ok(())
}
