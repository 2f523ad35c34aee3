//! `sledge training`.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::chat::public_key;
use super::{ProfileArgs, date, failed, json_line, text_or_stdin};
use crate::client::app::ContributionStatus;
use crate::config::Config;
use crate::error::Error;
use crate::protocol::{EventId, PublicKey, nip19};
use crate::sync::training::{Consent, Quality, Terms};

/// Arguments of `training`.
#[derive(Debug, Args)]
pub struct TrainingArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(subcommand)]
    command: TrainingCommand,
}

/// What to do with training data.
#[derive(Debug, Subcommand)]
pub enum TrainingCommand {
    /// Give a text as training data
    ///
    /// Gives away a text under a license. It goes, not encrypted, to the `training_relays` of `[client]` in the settings and
    /// to no others, readable by you and the curators that you name. Since it cannot be taken back from those who have
    /// read it, you must say --consent; `training withdraw` asks everybody to forget it.
    #[command(after_help = "Examples:
  sledge training contribute 'Q: … A: …' --license CC-BY-4.0 --quality 80 --consent
  sledge training contribute - --license CC0-1.0 --consent < dialogue.txt")]
    Contribute {
        /// The text; - reads it from standard input
        text: String,
        /// The license, by its SPDX name
        #[arg(long, value_name = "SPDX")]
        license: String,
        /// How good you think it is, 0 to 100
        #[arg(long, value_name = "PERCENT")]
        quality: Option<u8>,
        /// Who may read it besides you, npub or hex; may be repeated
        #[arg(long, value_name = "PUBKEY")]
        curator: Vec<String>,
        /// You agree that this very text is given away
        #[arg(long)]
        consent: bool,
    },
    /// Rate a contribution
    ///
    /// Says how good somebody else's contribution is. Of several ratings by you the latest counts.
    #[command(after_help = "Examples:
  sledge training rate 5c83da77af1dec6d7289834998ad7aafbd9e2191396d75ec3cc27f5a77226f36 85")]
    Rate {
        /// The contribution's event id, hex or note1
        event: String,
        /// 0 to 100
        percent: u8,
    },
    /// Withdraw a contribution
    ///
    /// Asks relays and readers to delete a contribution of yours.
    #[command(after_help = "Examples:
  sledge training withdraw 5c83da77af1dec6d7289834998ad7aafbd9e2191396d75ec3cc27f5a77226f36")]
    Withdraw {
        /// The contribution's event id, hex or note1
        event: String,
    },
    /// Show contributions and what became of them
    ///
    /// Prints the contributions that you gave or may read: date, status by the word of `training_operators` of `[client]` in
    /// the settings (pending, rejected, approved, rewarded), number of ratings, id and the beginning of the text.
    #[command(after_help = "Examples:\n  sledge training status\n  sledge training status --json --offline")]
    Status,
}

/// Runs `training`.
pub fn run(args: &TrainingArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let profile = &args.profile;
    let text = match &args.command {
        TrainingCommand::Contribute { text, license, quality, curator, consent } => {
            if !consent {
                return Err(Error::Usage("a text is given away only with --consent".to_owned()));
            }
            let text = text_or_stdin(text)?;
            let curators = curator.iter().map(|key| public_key(key)).collect::<Result<_, _>>()?;
            let quality = quality.map(percent).transpose()?;
            let terms = Terms { quality, license: license.clone(), curators };
            let consent = Consent::to(&text);
            profile.write(config, |client| client.training().contribute(&text, terms, consent).map_err(failed))?;
            String::new()
        }
        TrainingCommand::Rate { event, percent: number } => {
            let (event, quality) = (event_id(event)?, percent(*number)?);
            profile.write(config, |client| client.training().rate(&event, quality).map_err(failed))?;
            String::new()
        }
        TrainingCommand::Withdraw { event } => {
            let event = event_id(event)?;
            profile.write(config, |client| client.training().withdraw(&event).map_err(failed))?;
            String::new()
        }
        TrainingCommand::Status => {
            let operators = operators(config)?;
            let all = profile.read(config, |client| client.training().status(&operators).map_err(failed))?;
            all.iter().map(|one| status_line(one, profile.json)).collect()
        }
    };
    super::super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn percent(number: u8) -> Result<Quality, Error> {
    Quality::new(number).ok_or_else(|| Error::Usage(format!("{number} is no quality; it goes from 0 to 100")))
}

fn event_id(text: &str) -> Result<EventId, Error> {
    let id = nip19::parse_id(text).map_err(|error| Error::Usage(format!("`{text}`: {error}")))?;
    Ok(EventId(id))
}

fn operators(config: &Config) -> Result<Vec<PublicKey>, Error> {
    let read = |text: &String| {
        let key = nip19::parse_pubkey(text);
        key.map(PublicKey).map_err(|error| config.refuse("client.training_operators", format!("`{text}`: {error}")))
    };
    Ok(config.client.training_operators.iter().map(read).collect::<Result<_, _>>()?)
}

fn status_line(one: &ContributionStatus, as_json: bool) -> String {
    let given = &one.contribution;
    let status = serde_json::to_value(one.status).unwrap_or_default();
    if as_json {
        let ratings: serde_json::Map<String, serde_json::Value> =
            one.ratings.iter().map(|(rater, quality)| (rater.to_hex(), json!(quality.percent()))).collect();
        return json_line(&json!({
            "id": given.id.to_hex(),
            "author": given.author.to_hex(),
            "created_at": given.created_at,
            "status": status,
            "quality": given.terms.quality.map(Quality::percent),
            "license": given.terms.license,
            "ratings": ratings,
            "content": given.content,
        }));
    }
    let beginning: String = given.content.chars().take(40).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let (date, status) = (date(given.created_at), status.as_str().unwrap_or_default().to_owned());
    format!("{date}  {status:8}  {:>3} ratings  {}  {beginning}\n", one.ratings.len(), given.id)
}
