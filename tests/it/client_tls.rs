//! The client at a relay's encrypted port: reached when an authority that the machine knows stands for it, and refused
//! otherwise.

use super::client_crash::laptop;
use super::support::Binary;
use super::tls::{encrypted, fixture};

/// Written on one laptop over TLS, read on another over TLS; a laptop that does not know the authority says so and keeps
/// what it wrote.
#[test]
fn a_relay_behind_tls_is_reached_if_it_is_trusted() {
    let binary = Binary::new();
    let (_relay, addr) = encrypted(&binary);
    let url = format!("wss://localhost:{}", addr.port());
    let [writer, reader] = [(), ()].map(|()| laptop(std::slice::from_ref(&url)));
    // What stands for the relay: the authority of the fixtures, or a certificate that is no authority.
    let run = |laptop: &Binary, args: &[&str], trusted: &str| {
        laptop.command(args).env("SSL_CERT_FILE", fixture(trusted)).output().unwrap()
    };
    let trusting = |laptop: &Binary, args: &[&str]| {
        let output = run(laptop, args, "ca.pem");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    writer.run(&["chat", "new", "Lisbon", "--offline"]).ok();
    let distrusting = run(&writer, &["outbox", "flush"], "two.pem");
    let complaint = String::from_utf8_lossy(&distrusting.stderr).to_lowercase();
    assert!(!distrusting.status.success() && complaint.contains("certificate"), "{complaint}");
    trusting(&writer, &["outbox", "flush"]);
    assert!(trusting(&reader, &["chat", "list"]).contains("Lisbon"));
}
