//! `kvm-ops attest flip`: every bit of evidence, flipped.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use kvm_ops_attest::flip::{self, FlipError, Line};
use kvm_ops_attest::{snp, tdx};
use serde::Serialize;

use super::args::{RootChoice, parse_time};
use super::snp::{Input, roots};
use super::tdx::{Input as QuoteInput, root};
use super::verify::{is_quote, time};
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// Flips every bit of evidence, one at a time, and shows by field which check refuses it
///
/// A report or quote is verified with each of its bits changed, then with each bit of the
/// certificates above it changed, and of the collateral beside a quote. Each bit must be refused, or be
/// shown to be outside of what is signed: text around certificates, or a root's certificate where the
/// trusted key stands in for it. This takes minutes; with --every it takes less.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The exit code is 0 only if no flipped bit is believed, and 1 if one is, or if the evidence is refused as it is.

Examples:
  kvm-ops attest flip demo --root software
  kvm-ops attest flip report.bin --cert-chain vcek.der --cert-chain cert_chain.pem --every 97
  kvm-ops attest flip quote.bin --collateral collateral.json --time 2025-06-20")]
pub(super) struct FlipArgs {
    /// The report or quote, or a directory that `kvm-ops attest new` has written
    #[arg(value_name = "EVIDENCE|DIR")]
    evidence: PathBuf,

    /// The root that is trusted: `software` (whose private key is public), or a certificate
    /// [default: the vendor's]
    #[arg(long, value_name = "ROOT")]
    root: Option<RootChoice>,

    /// A report's certificates: DER or PEM, one or several, or the table of an extended guest request
    #[arg(long, value_name = "FILE", conflicts_with = "collateral")]
    cert_chain: Vec<PathBuf>,

    /// A quote's collateral, as JSON in the form of dcap-qvl
    #[arg(long, value_name = "FILE")]
    collateral: Option<PathBuf>,

    /// When certificates must be valid: seconds of Unix time or a date (RFC 3339) [default: now]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    time: Option<u64>,

    /// Flip of each field the first bit and every Nth from there
    #[arg(long, value_name = "N", default_value = "1")]
    every: NonZeroUsize,

    /// Report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &FlipArgs) -> Outcome {
    let lines = match is_quote(&args.evidence, args.collateral.as_deref()) {
        true => of_quote(args)?,
        false => of_report(args)?,
    };
    let lines = lines.map_err(|error| {
        let name = args.evidence.display();
        Failure::because(format!("cannot flip the bits of {name}"), error).code(Code::Negative)
    })?;
    let totals = Totals::of(&lines);
    if args.json {
        let lines = lines.iter().map(JsonLine::of).collect();
        term::say_json(&Json { totals, lines })?;
    } else {
        term::say(format!("{}\n\n{}", text(&lines), totals.text()))?;
    }
    let believed = lines.iter().find(|line| !line.believed.is_empty());
    match believed {
        None => Ok(Code::Fine),
        Some(line) => Err(Failure::new(format!(
            "bits of {} ({}) are believed, whatever they are",
            line.piece, line.field
        ))
        .code(Code::Negative)),
    }
}

fn of_report(args: &FlipArgs) -> Result<Result<Vec<Line>, FlipError>, Failure> {
    let input = Input::read(&args.evidence, &args.cert_chain, None)?;
    let certificates: Vec<&[u8]> = input.certificates.iter().map(Vec::as_slice).collect();
    let evidence = snp::Evidence {
        report: &input.report,
        certificates: &certificates,
        crl: None,
    };
    let (roots, now) = (roots(args.root.as_ref())?, time(args.time)?);
    Ok(flip::report(&evidence, &roots, now, args.every))
}

fn of_quote(args: &FlipArgs) -> Result<Result<Vec<Line>, FlipError>, Failure> {
    let input = QuoteInput::read(&args.evidence, args.collateral.as_deref())?;
    let evidence = tdx::Evidence {
        quote: &input.quote,
        collateral: &input.collateral,
        event_log: None,
    };
    let (root, now) = (root(args.root.as_ref())?, time(args.time)?);
    Ok(flip::quote(&evidence, &root, now, args.every))
}

fn text(lines: &[Line]) -> String {
    let mut rows = table(&["PIECE", "FIELD", "BYTES", "BITS", "REFUSED BY", "OUTSIDE"]);
    let mut piece = "";
    for line in lines {
        // The name of a piece stands in its first line.
        let name = if line.piece == piece { "" } else { &line.piece };
        piece = &line.piece;
        rows.add_row([
            name,
            &line.field,
            &format!("{:#x}..{:#x}", line.at.start, line.at.end),
            &line.flipped.to_string(),
            &checks(&line.refused),
            &outside(line),
        ]);
    }
    finish(rows)
}

fn checks(refused: &BTreeMap<&'static str, usize>) -> String {
    let mut checks: Vec<_> = refused.iter().collect();
    checks.sort_by_key(|(_, bits)| std::cmp::Reverse(**bits));
    let checks = checks.iter().map(|(check, bits)| format!("{check} {bits}"));
    checks.collect::<Vec<_>>().join(", ")
}

fn outside(line: &Line) -> String {
    let bits: usize = line.outside.values().sum();
    match (bits, line.believed.len()) {
        (0, 0) => String::new(),
        (bits, 0) => bits.to_string(),
        (_, believed) => format!("BELIEVED: {believed}"),
    }
}

/// All lines together.
#[derive(Serialize)]
struct Totals {
    flipped: usize,
    refused: usize,
    /// By the reason.
    outside: BTreeMap<&'static str, usize>,
    believed: usize,
}

impl Totals {
    fn of(lines: &[Line]) -> Self {
        let mut outside = BTreeMap::new();
        for (reason, bits) in lines.iter().flat_map(|line| &line.outside) {
            *outside.entry(*reason).or_default() += bits;
        }
        Self {
            flipped: lines.iter().map(|line| line.flipped).sum(),
            refused: lines.iter().flat_map(|line| line.refused.values()).sum(),
            outside,
            believed: lines.iter().map(|line| line.believed.len()).sum(),
        }
    }

    fn text(&self) -> String {
        let outside: usize = self.outside.values().sum();
        let mut text = format!(
            "{} bits flipped: {} refused, {outside} outside of what is signed, {} believed",
            self.flipped, self.refused, self.believed
        );
        for (reason, bits) in &self.outside {
            text.push_str(&format!("\noutside, {bits}: {reason}"));
        }
        text
    }
}

#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    totals: Totals,
    lines: Vec<JsonLine<'a>>,
}

#[derive(Serialize)]
struct JsonLine<'a> {
    piece: &'a str,
    field: &'a str,
    /// First byte, and the first byte behind.
    bytes: [usize; 2],
    flipped: usize,
    refused: &'a BTreeMap<&'static str, usize>,
    outside: &'a BTreeMap<&'static str, usize>,
    believed: &'a [usize],
}

impl<'a> JsonLine<'a> {
    fn of(line: &'a Line) -> Self {
        Self {
            piece: &line.piece,
            field: &line.field,
            bytes: [line.at.start, line.at.end],
            flipped: line.flipped,
            refused: &line.refused,
            outside: &line.outside,
            believed: &line.believed,
        }
    }
}
