//! Keys and ids as people write them (NIP-19): `npub`, `nsec`, `note`, `nprofile`, `nevent` and plain hex.
//!
//! On the wire Nostr knows hex only; these forms are for settings, command lines and logs. Whether 32 bytes are a
//! point of the curve is not looked at here.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/19.md>

use std::fmt;

use bech32::primitives::decode::UncheckedHrpstring;
use bech32::{Bech32, Checksum, Hrp};

/// Longest text that is decoded, as NIP-19 advises.
pub const CHARS_MAX: usize = 5_000;

/// What a bech32 text of NIP-19 can start with.
const PREFIXES: [&str; 6] = ["npub", "nsec", "note", "nprofile", "nevent", "naddr"];

/// TLV type of the key or id itself in `nprofile` and `nevent`.
const TLV_SPECIAL: u8 = 0;

/// Which of the bare 32-byte forms a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A public key, `npub1…`.
    Npub,
    /// A secret key, `nsec1…`.
    Nsec,
    /// An event id, `note1…`.
    Note,
}

impl Form {
    /// The part before the `1`.
    pub const fn prefix(self) -> &'static str {
        match self {
            Form::Npub => "npub",
            Form::Nsec => "nsec",
            Form::Note => "note",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix())
    }
}

/// Why a text is not the key or id that was asked for. Never repeats the text: it may be a secret key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Neither hex of the right length nor a bech32 text.
    #[error("neither 64 hex digits nor a text that starts with {expected}1")]
    Unrecognised {
        /// The usual prefix here.
        expected: &'static str,
    },
    /// Longer than [`CHARS_MAX`].
    #[error("longer than {CHARS_MAX} characters")]
    TooLong,
    /// The bech32 checksum does not match.
    #[error("the checksum does not match: a character is wrong or missing")]
    Checksum,
    /// Another kind of text than asked for.
    #[error("starts with {found}1, but {expected}1 is wanted here")]
    WrongPrefix {
        /// The usual prefix here.
        expected: &'static str,
        /// The prefix of the text.
        found: String,
    },
    /// A secret key where a public key or an id is wanted. It has a variant of its own, since whoever reads the message should
    /// consider where the key has been shown.
    #[error("this is a secret key (nsec1), which belongs in no settings file and on no command line")]
    SecretKey,
    /// The prefix is right, what follows is not 32 bytes.
    #[error("does not hold 32 bytes")]
    Length,
}

/// Writes 32 bytes in a bech32 form.
pub fn encode(form: Form, bytes: &[u8; 32]) -> String {
    bech32::encode::<Bech32>(Hrp::parse_unchecked(form.prefix()), bytes)
        .expect("32 bytes are far below the longest bech32 text")
}

/// Reads a bare bech32 form: exactly this prefix and 32 bytes.
///
/// # Errors
/// [`KeyError`], saying what is wrong without repeating the text.
pub fn decode(form: Form, text: &str) -> Result<[u8; 32], KeyError> {
    let expected = form.prefix();
    let (prefix, data) = decode_bech32(text, expected)?;
    if prefix == expected {
        return data.try_into().map_err(|_| KeyError::Length);
    }
    Err(wrong_prefix(expected, prefix))
}

/// Reads a public key: `npub`, `nprofile`, or 64 hex digits of either case.
///
/// # Errors
/// [`KeyError`]; [`KeyError::SecretKey`] for an `nsec`.
pub fn parse_pubkey(text: &str) -> Result<[u8; 32], KeyError> {
    parse(text, Form::Npub, "nprofile")
}

/// Reads an event id: `note`, `nevent`, or 64 hex digits of either case.
///
/// # Errors
/// [`KeyError`].
pub fn parse_id(text: &str) -> Result<[u8; 32], KeyError> {
    parse(text, Form::Note, "nevent")
}

/// Reads a secret key: `nsec`, or 64 hex digits of either case.
///
/// # Errors
/// [`KeyError`].
pub fn parse_secret_key(text: &str) -> Result<[u8; 32], KeyError> {
    match parse_hex(text) {
        Some(bytes) => Ok(bytes),
        None => decode(Form::Nsec, text),
    }
}

fn parse(text: &str, bare: Form, with_tlv: &str) -> Result<[u8; 32], KeyError> {
    if let Some(bytes) = parse_hex(text) {
        return Ok(bytes);
    }
    let (prefix, data) = decode_bech32(text, bare.prefix())?;
    if prefix == bare.prefix() {
        data.try_into().map_err(|_| KeyError::Length)
    } else if prefix == with_tlv {
        let special = first_tlv(&data, TLV_SPECIAL).ok_or(KeyError::Length)?;
        special.try_into().map_err(|_| KeyError::Length)
    } else {
        Err(wrong_prefix(bare.prefix(), prefix))
    }
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    faster_hex::hex_decode(text.as_bytes(), &mut bytes).ok()?;
    Some(bytes)
}

fn wrong_prefix(expected: &'static str, found: String) -> KeyError {
    if found == Form::Nsec.prefix() {
        return KeyError::SecretKey;
    }
    KeyError::WrongPrefix { expected, found }
}

/// The prefix in lower case, and the data.
fn decode_bech32(text: &str, expected: &'static str) -> Result<(String, Vec<u8>), KeyError> {
    if text.len() > CHARS_MAX {
        return Err(KeyError::TooLong);
    }
    let unchecked = UncheckedHrpstring::new(text).map_err(|_| KeyError::Unrecognised { expected })?;
    let prefix = unchecked.hrp().to_lowercase();
    if unchecked.validate_checksum::<LongBech32>().is_err() {
        // Half of all hex texts look like bech32 with a strange prefix; those were not meant as bech32.
        let meant = PREFIXES.contains(&prefix.as_str());
        return Err(if meant { KeyError::Checksum } else { KeyError::Unrecognised { expected } });
    }
    let data = unchecked.remove_checksum::<LongBech32>().byte_iter().collect();
    Ok((prefix, data))
}

/// The value of the first entry of this type; entries of other types are passed over, a cut-off one ends the list.
fn first_tlv(mut data: &[u8], wanted: u8) -> Option<&[u8]> {
    while let [found, length, rest @ ..] = data {
        let (value, rest) = rest.split_at_checked(usize::from(*length))?;
        if *found == wanted {
            return Some(value);
        }
        data = rest;
    }
    None
}

/// Bech32 up to the length that NIP-19 allows; the plain one ends at 1,023 characters, which an `nprofile` with many
/// relays exceeds.
enum LongBech32 {}

impl Checksum for LongBech32 {
    type MidstateRepr = <Bech32 as Checksum>::MidstateRepr;
    type CorrectionField = <Bech32 as Checksum>::CorrectionField;
    const ROOT_GENERATOR: Self::CorrectionField = Bech32::ROOT_GENERATOR;
    const ROOT_EXPONENTS: std::ops::RangeInclusive<usize> = Bech32::ROOT_EXPONENTS;
    const CODE_LENGTH: usize = CHARS_MAX;
    const CHECKSUM_LENGTH: usize = Bech32::CHECKSUM_LENGTH;
    const GENERATOR_SH: [Self::MidstateRepr; 5] = Bech32::GENERATOR_SH;
    const TARGET_RESIDUE: Self::MidstateRepr = Bech32::TARGET_RESIDUE;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NPUB: &str = "npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg";
    const NPUB_HEX: &str = "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e";
    const NSEC: &str = "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5";
    const NSEC_HEX: &str = "67dea2ed018072d675f5415ecfaed7d2597555e202d85b3d65ea4e58d2d92ffa";
    const NPROFILE: &str = "nprofile1qqsrhuxx8l9ex335q7he0f09aej04zpazpl0ne2cgukyawd24mayt8gpp4mhxue69uhhytnc9e3k7mgpz4mhxue69uhkg6nzv9ejuumpv34kytnrdaksjlyr9p";
    const NPROFILE_HEX: &str = "3bf0c63fcb93463407af97a5e5ee64fa883d107ef9e558472c4eb9aaaefa459d";

    fn hex(text: &str) -> [u8; 32] {
        parse_hex(text).unwrap()
    }

    fn with_prefix(prefix: &str, data: &[u8]) -> String {
        bech32::encode::<LongBech32>(Hrp::parse(prefix).unwrap(), data).unwrap()
    }

    /// The examples that stand in NIP-19, both ways.
    #[test]
    fn nip19_examples_read_and_write() {
        assert_eq!(decode(Form::Npub, NPUB), Ok(hex(NPUB_HEX)));
        assert_eq!(encode(Form::Npub, &hex(NPUB_HEX)), NPUB);
        assert_eq!(decode(Form::Nsec, NSEC), Ok(hex(NSEC_HEX)));
        assert_eq!(encode(Form::Nsec, &hex(NSEC_HEX)), NSEC);
        assert_eq!(parse_pubkey(NPROFILE), Ok(hex(NPROFILE_HEX)));
        assert_eq!(
            encode(Form::Npub, &hex(NPROFILE_HEX)),
            "npub180cvv07tjdrrgpa0j7j7tmnyl2yr6yr7l8j4s3evf6u64th6gkwsyjh6w6"
        );
    }

    /// Every accepted spelling of a public key is the same key: case of hex, of bech32, and npub.
    #[test]
    fn a_pubkey_is_read_in_each_of_its_spellings() {
        for text in [NPUB, &NPUB.to_uppercase(), NPUB_HEX, &NPUB_HEX.to_uppercase()] {
            assert_eq!(parse_pubkey(text), Ok(hex(NPUB_HEX)), "{text}");
        }
        assert_eq!(parse_secret_key(NSEC), Ok(hex(NSEC_HEX)));
        assert_eq!(parse_secret_key(NSEC_HEX), Ok(hex(NSEC_HEX)));
    }

    /// note, nevent and hex name the same event; a nevent may list its relay before its id.
    #[test]
    fn an_id_is_read_in_each_of_its_spellings() {
        let id = hex(NPUB_HEX);
        let mut nevent = vec![1, 3, b'a', b'b', b'c', TLV_SPECIAL, 32];
        nevent.extend(id);
        nevent.extend([TLV_SPECIAL, 1, 9]);
        for text in [encode(Form::Note, &id), with_prefix("nevent", &nevent), NPUB_HEX.to_owned()] {
            assert_eq!(parse_id(&text), Ok(id), "{text}");
        }
    }

    /// A profile with forty relays is longer than plain bech32 allows and shorter than NIP-19 does.
    #[test]
    fn a_long_nprofile_is_read() {
        let mut data = vec![TLV_SPECIAL, 32];
        data.extend(hex(NPUB_HEX));
        for _ in 0..40 {
            data.extend([1, 30]);
            data.extend([b'r'; 30]);
        }
        let text = with_prefix("nprofile", &data);
        assert!(text.len() > 1_023);
        assert_eq!(parse_pubkey(&text), Ok(hex(NPUB_HEX)));
    }

    /// Each way to be wrong has its own message.
    #[test]
    fn wrong_texts_say_what_is_wrong() {
        let unrecognised = KeyError::Unrecognised { expected: "npub" };
        let mut damaged = NPUB.to_owned();
        damaged.replace_range(10..11, "q");
        let wrong = |found: &str| KeyError::WrongPrefix { expected: "npub", found: found.to_owned() };
        for (text, expected) in [
            (String::new(), unrecognised.clone()),
            (NPUB_HEX[1..].to_owned(), unrecognised.clone()),
            (format!("{}zz", &NPUB_HEX[2..]), unrecognised.clone()),
            ("é".repeat(32), unrecognised),
            (damaged, KeyError::Checksum),
            (NPUB[..60].to_owned(), KeyError::Checksum),
            (NSEC.to_owned(), KeyError::SecretKey),
            (encode(Form::Note, &[1; 32]), wrong("note")),
            (with_prefix("npub", &[7; 31]), KeyError::Length),
            (with_prefix("nprofile", &[TLV_SPECIAL, 31]), KeyError::Length),
            (with_prefix("nprofile", &[1, 0]), KeyError::Length),
            (with_prefix("nprofile", &[]), KeyError::Length),
            ("x".repeat(CHARS_MAX + 1), KeyError::TooLong),
        ] {
            assert_eq!(parse_pubkey(&text), Err(expected), "{text}");
        }
        assert_eq!(parse_secret_key(NPUB), Err(KeyError::WrongPrefix { expected: "nsec", found: "npub".to_owned() }));
    }

    /// NIP-19 uses bech32; the newer bech32m has another checksum and is refused.
    #[test]
    fn bech32m_is_refused() {
        let text = bech32::encode::<bech32::Bech32m>(Hrp::parse("npub").unwrap(), &[7; 32]).unwrap();
        assert_eq!(parse_pubkey(&text), Err(KeyError::Checksum));
    }

    /// No message repeats a secret.
    #[test]
    fn errors_never_repeat_the_text() {
        for text in [NSEC, &NSEC[..61], &NSEC_HEX[..63]] {
            let message = parse_pubkey(text).unwrap_err().to_string();
            assert!(!message.contains(&text[6..20]), "{message}");
        }
    }
}
