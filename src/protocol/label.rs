//! The self-label (NIP-32) by which the events of the sync engine are told from all others.
//!
//! Chats live on kind 30001, settings on 10001 and training data on 1, kinds that other clients use for other things.
//! An event is one of ours if it carries the label, and only then does anything in this crate treat it differently.

use super::event::Fields;
use super::tag::TagLetter;

/// The namespace of our labels: the value of the `L` tag.
pub const NAMESPACE: &str = "com.openagents.sync";

/// Whether an event carries our label.
pub fn is_labelled(event: &impl Fields) -> bool {
    event.has_tag(TagLetter::LABEL_NAMESPACE, &mut |value| value == NAMESPACE)
}
