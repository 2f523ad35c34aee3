//! `sledge key generate`, `sledge key import` and `sledge key show`.

use std::fs::OpenOptions;
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use secp256k1::{Keypair, SecretKey, XOnlyPublicKey};
use serde::Serialize;

use crate::error::Error;
use crate::protocol::nip06;
use crate::protocol::nip19::{self, Form, KeyError};
use crate::sync::import::old_secret_key;

/// A mnemonic has no fewer words.
const WORDS_MIN: usize = 12;

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a new key pair
    ///
    /// Prints the new public and secret key, each as bech32 (npub, nsec) and as hex. With --out the secret goes to a
    /// file that only you can read, and only the public key is printed. Whoever has the secret key is you: keep it
    /// off command lines and out of repositories.
    #[command(after_help = "Examples:\n  sledge key generate\n  sledge key generate --out relay.nsec")]
    Generate(GenerateArgs),
    /// Make a key pair from words
    ///
    /// Reads a mnemonic of 12 to 24 English words from standard input, so that it need not stand on the command line, and
    /// prints the key pair that NIP-06 derives from it, or with --older the one that the older app made. With --out the
    /// secret goes to a file that only you can read, and only the public key is printed.
    #[command(after_help = "Examples:
  sledge key import --out my.nsec < words.txt
  sledge key import --older --out my.nsec")]
    Import(ImportArgs),
    /// Show a key in all its spellings
    ///
    /// Reads an npub, nprofile, nsec or 64 hex digits and prints the key as bech32 and as hex; for a secret key also
    /// the public key that belongs to it. Without KEY the key is read from standard input, so that a secret need not
    /// stand on the command line, where other users and the shell's history see it.
    #[command(after_help = "Examples:
  sledge key show npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg
  sledge key show < relay.nsec")]
    Show(ShowArgs),
}

/// Arguments of `key generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Write the nsec to this new file with mode 0600 and print only the public key
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `key import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Which of the mnemonic's keys
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub account: u32,
    /// The key of the older app: the SHA-256 of the words
    #[arg(long, conflicts_with = "account")]
    pub older: bool,
    /// Write the nsec to this new file with mode 0600 and print only the public key
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `key show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// npub, nprofile, nsec or 64 hex digits; from standard input when missing
    pub key: Option<String>,
    /// Take hex digits for a secret key; without this they are a public one
    #[arg(long)]
    pub secret: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One key in all its spellings; the secret ones only where a secret key was given or made.
#[derive(Debug, PartialEq, Serialize)]
struct Spellings {
    npub: String,
    public_hex: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    nsec: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_hex: Option<String>,
}

/// Runs `key generate`, `key import` or `key show`.
pub fn run(command: KeyCommand, input: &mut impl BufRead, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (spellings, json) = match command {
        KeyCommand::Generate(args) => {
            let pair = Keypair::new(&mut secp256k1::rand::rng());
            (kept(&pair, args.out.as_deref())?, args.json)
        }
        KeyCommand::Import(args) => {
            let pair = pair_of_words(&read_words(input)?, args.account, args.older)?;
            (kept(&pair, args.out.as_deref())?, args.json)
        }
        KeyCommand::Show(args) => {
            let text = match args.key {
                Some(key) => key,
                None => read_line(input)?,
            };
            (spellings_of(text.trim(), args.secret)?, args.json)
        }
    };
    super::print(out, &spellings.to_text(json))?;
    Ok(ExitCode::SUCCESS)
}

/// A key pair's spellings, without the secret when that goes to a file.
fn kept(pair: &Keypair, file: Option<&Path>) -> Result<Spellings, Error> {
    let secret = Spellings::of_secret(pair);
    let Some(file) = file else {
        return Ok(secret);
    };
    let public = Spellings::of_public(&pair.x_only_public_key().0);
    let nsec = secret.nsec.expect("spellings of a secret key hold it");
    write_secret(file, &nsec)?;
    Ok(public)
}

/// Never overwrites: the file may hold the only copy of another key.
fn write_secret(file: &Path, nsec: &str) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut created = options.open(file).map_err(Error::io("create the new key file", file))?;
    writeln!(created, "{nsec}").and_then(|()| created.sync_all()).map_err(Error::io("write the key file", file))
}

/// All words of a line, or of a whole text where the first line has only some of them.
fn read_words(input: &mut impl BufRead) -> Result<String, Error> {
    let mut text = read_line(input)?;
    if text.split_whitespace().count() < WORDS_MIN {
        let rest = input.take(nip19::CHARS_MAX as u64).read_to_string(&mut text);
        rest.map_err(Error::io("read words from", "standard input"))?;
    }
    Ok(text)
}

fn pair_of_words(text: &str, account: u32, older: bool) -> Result<Keypair, Error> {
    let refused = |error: nip06::MnemonicError| Error::Usage(format!("cannot read the words: {error}"));
    let secret = if older {
        old_secret_key(&nip06::check(text).map_err(refused)?.join(" "))
    } else {
        nip06::secret_key(text, account).map_err(refused)?
    };
    pair_of(secret)
}

fn pair_of(secret: [u8; 32]) -> Result<Keypair, Error> {
    let secret = SecretKey::from_secret_bytes(secret)
        .map_err(|_| Error::Usage("these 32 bytes are no secret key of secp256k1".to_owned()))?;
    Ok(Keypair::from_secret_key(&secret))
}

fn read_line(input: &mut impl BufRead) -> Result<String, Error> {
    // A key has at most some thousand characters; more is a wrong file.
    let mut line = String::new();
    let limit = nip19::CHARS_MAX as u64 + 2;
    input.take(limit).read_line(&mut line).map_err(Error::io("read a key from", "standard input"))?;
    Ok(line)
}

fn spellings_of(text: &str, hex_is_secret: bool) -> Result<Spellings, Error> {
    let refused = |error: KeyError| Error::Usage(format!("cannot read the key: {error}"));
    if !hex_is_secret {
        match nip19::parse_pubkey(text) {
            Err(KeyError::SecretKey) => {}
            public => return public_spellings(public.map_err(refused)?),
        }
    }
    let secret = nip19::parse_secret_key(text).map_err(refused)?;
    Ok(Spellings::of_secret(&pair_of(secret)?))
}

fn public_spellings(bytes: [u8; 32]) -> Result<Spellings, Error> {
    let point = XOnlyPublicKey::from_byte_array(bytes).map_err(|_| {
        Error::Usage("these 32 bytes are no public key of secp256k1; for a secret key in hex add --secret".to_owned())
    })?;
    Ok(Spellings::of_public(&point))
}

impl Spellings {
    fn of_public(point: &XOnlyPublicKey) -> Spellings {
        let public = point.to_byte_array();
        Spellings {
            npub: nip19::encode(Form::Npub, &public),
            public_hex: faster_hex::hex_string(&public),
            nsec: None,
            secret_hex: None,
        }
    }

    fn of_secret(pair: &Keypair) -> Spellings {
        let secret = pair.to_secret_bytes();
        Spellings {
            nsec: Some(nip19::encode(Form::Nsec, &secret)),
            secret_hex: Some(faster_hex::hex_string(&secret)),
            ..Spellings::of_public(&pair.x_only_public_key().0)
        }
    }

    fn to_text(&self, json: bool) -> String {
        if json {
            return serde_json::to_string(self).expect("spellings are strings") + "\n";
        }
        let mut text = format!("npub        {}\npublic hex  {}\n", self.npub, self.public_hex);
        if let (Some(nsec), Some(hex)) = (&self.nsec, &self.secret_hex) {
            text += &format!("nsec        {nsec}\nsecret hex  {hex}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NPUB: &str = "npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg";
    const PUBLIC_HEX: &str = "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e";
    const NSEC: &str = "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5";
    const SECRET_HEX: &str = "67dea2ed018072d675f5415ecfaed7d2597555e202d85b3d65ea4e58d2d92ffa";

    fn show(key: Option<&str>, input: &str, secret: bool, json: bool) -> Result<String, Error> {
        let args = ShowArgs { key: key.map(str::to_owned), secret, json };
        let mut out = Vec::new();
        run(KeyCommand::Show(args), &mut input.as_bytes(), &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// NIP-19's examples: NPUB is the public key of NSEC.
    #[test]
    fn a_key_is_shown_in_all_its_spellings() {
        let public = format!("npub        {NPUB}\npublic hex  {PUBLIC_HEX}\n");
        assert_eq!(show(Some(NPUB), "", false, false).unwrap(), public);
        assert_eq!(show(Some(PUBLIC_HEX), "", false, false).unwrap(), public);
        let both = format!("{public}nsec        {NSEC}\nsecret hex  {SECRET_HEX}\n");
        assert_eq!(show(None, &format!("{NSEC}\n"), false, false).unwrap(), both);
        assert_eq!(show(None, SECRET_HEX, true, false).unwrap(), both);
    }

    /// Scripts read one JSON object; a public key has no secret fields in it.
    #[test]
    fn json_holds_the_same_fields() {
        let json = show(Some(NPUB), "", false, true).unwrap();
        assert_eq!(json, format!("{{\"npub\":\"{NPUB}\",\"public_hex\":\"{PUBLIC_HEX}\"}}\n"));
    }

    /// What is no key is a usage error that does not repeat the text.
    #[test]
    fn what_is_no_key_is_refused() {
        for (text, secret) in
            [("", false), ("hello", false), (NPUB, true), (&"f".repeat(64), false), (&"0".repeat(64), true)]
        {
            let error = show(None, text, secret, false).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}");
        }
        let error = show(None, &NSEC[..40], false, false).unwrap_err().to_string();
        assert!(!error.contains(&NSEC[..40]), "{error}");
    }

    /// With --out the secret is in the file and nowhere else, and the file belongs to its owner alone.
    #[test]
    fn a_generated_secret_goes_to_a_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("relay.nsec");
        let generate = || KeyCommand::Generate(GenerateArgs { out: Some(file.clone()), json: false });
        let mut out = Vec::new();
        run(generate(), &mut "".as_bytes(), &mut out).unwrap();
        let printed = String::from_utf8(out).unwrap();
        assert!(printed.contains("npub1") && !printed.contains("nsec"), "{printed}");

        let nsec = std::fs::read_to_string(&file).unwrap();
        let shown = show(None, &nsec, false, false).unwrap();
        assert!(shown.starts_with(&printed), "{shown}");
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
            assert_eq!(mode & 0o777, 0o600);
        }

        let again = run(generate(), &mut "".as_bytes(), &mut Vec::new()).unwrap_err();
        assert!(again.to_string().contains("relay.nsec"), "{again}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), nsec, "an old key is never overwritten");
    }

    /// NIP-06's example from one line or one word a line, the older app's key of the same words, and a file like that of a
    /// generated key. What is no mnemonic is a usage error that does not repeat a word.
    #[test]
    fn words_make_keys() {
        const WORDS: &str = "leader monkey parrot ring guide accident before fence cannon height naive bean";
        let import = |input: &str, older, out: Option<PathBuf>| {
            let mut printed = Vec::new();
            let args = ImportArgs { account: 0, older, out, json: false };
            run(KeyCommand::Import(args), &mut input.as_bytes(), &mut printed)?;
            Ok::<String, Error>(String::from_utf8(printed).unwrap())
        };
        let printed = import(&format!("{WORDS}\n\nmy bank's words come next"), false, None).unwrap();
        assert!(printed.contains("nsec10allq0gjx7fddtzef0ax00mdps9t2kmtrldkyjfs8l5xruwvh2dq0lhhkp"), "{printed}");
        assert!(printed.contains("npub1zutzeysacnf9rru6zqwmxd54mud0k44tst6l70ja5mhv8jjumytsd2x7nu"), "{printed}");
        assert_eq!(import(&WORDS.replace(' ', "\n"), false, None).unwrap(), printed);
        let older = import(WORDS, true, None).unwrap();
        assert!(older.contains(&faster_hex::hex_string(&old_secret_key(WORDS))), "{older}");

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("my.nsec");
        let public = import(WORDS, false, Some(file.clone())).unwrap();
        assert!(!public.contains("nsec") && printed.starts_with(&public));
        assert_eq!(show(None, &std::fs::read_to_string(&file).unwrap(), false, false).unwrap(), printed);

        for wrong in ["", "leader monkey", &WORDS.replace("monkey", "mokney")] {
            let error = import(wrong, false, None).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(!error.to_string().contains("mokney"), "{error}");
        }
    }

    /// Two generated keys differ, and without --out the secret is printed.
    #[test]
    fn generated_keys_are_new() {
        let generate = || {
            let mut out = Vec::new();
            let args = GenerateArgs { out: None, json: true };
            run(KeyCommand::Generate(args), &mut "".as_bytes(), &mut out).unwrap();
            serde_json::from_slice::<serde_json::Value>(&out).unwrap()["nsec"].to_string()
        };
        let (first, second) = (generate(), generate());
        assert!(first.contains("nsec1") && first != second);
    }
}
