//! `kvm-ops measure tdx`: MRTD.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ValueEnum;
use kvm_ops_tdvf::{Section, Tdvf};
use serde::Serialize;

use crate::commands::measure::not_tdvf;
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::Outcome;
use crate::files;
use crate::term;

/// MRTD of a TD, from the TDVF metadata of its firmware
#[derive(Debug, clap::Args)]
#[command(after_help = "\
MRTD depends on the order in which pages are added and measured. Linux goes once over the pages
(single-pass); other VMMs add all pages of a section before they measure them (two-pass).

Examples:
  kvm-ops measure tdx OVMF.fd
  kvm-ops measure tdx OVMF.fd --order both --sections
  kvm-ops measure tdx OVMF.fd --json | jq -r '.mrtd.single'")]
pub(crate) struct Args {
    /// The firmware image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// In which order the VMM adds and measures pages
    #[arg(long, value_enum, default_value_t)]
    order: Order,

    /// Show the sections of the metadata, too
    #[arg(long, conflicts_with = "json")]
    sections: bool,

    /// Report as JSON, with the sections
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Order {
    /// Page by page: each is added, then measured
    #[default]
    Single,
    /// Section by section: all pages are added, then all are measured
    TwoPass,
    /// Both, each in a line of its own
    Both,
}

#[derive(Serialize)]
struct Report {
    image: String,
    bytes: usize,
    mrtd: BTreeMap<&'static str, String>,
    pages_added: u64,
    metadata_offset: usize,
    sections: Vec<SectionReport>,
}

#[derive(Serialize)]
struct SectionReport {
    kind: &'static str,
    data_offset: u32,
    raw_size: u32,
    memory_address: u64,
    memory_size: u64,
    extend: bool,
    aug: bool,
}

impl SectionReport {
    fn new(section: &Section) -> Self {
        Self {
            kind: section.kind.name(),
            data_offset: section.data_offset,
            raw_size: section.raw_size,
            memory_address: section.memory_address,
            memory_size: section.memory_size,
            extend: section.attributes.extend,
            aug: section.attributes.aug,
        }
    }
}

pub(in crate::commands::measure) fn run(args: &Args) -> Outcome {
    let image = files::read("the image", &args.image, files::FIRMWARE)?;
    let tdvf = Tdvf::parse(&image).map_err(|error| not_tdvf(&args.image, &image, error))?;
    let mrtd = |order| hex::encode(tdvf.mrtd(order));
    let single = || ("single", mrtd(kvm_ops_tdvf::Order::SinglePass));
    let two = || ("two-pass", mrtd(kvm_ops_tdvf::Order::TwoPass));
    let mrtds = match args.order {
        Order::Single => vec![single()],
        Order::TwoPass => vec![two()],
        Order::Both => vec![single(), two()],
    };
    if args.json {
        term::say_json(&Report {
            image: args.image.display().to_string(),
            bytes: image.len(),
            mrtd: mrtds.into_iter().collect(),
            pages_added: tdvf.launch().page_count(),
            metadata_offset: tdvf.metadata_offset(),
            sections: tdvf.sections().iter().map(SectionReport::new).collect(),
        })?;
        return Ok(Code::Fine);
    }
    if args.sections {
        term::say(sections(&tdvf))?;
        term::say("")?;
    }
    match mrtds.as_slice() {
        [(_, mrtd)] => term::say(mrtd)?,
        both => {
            for (order, mrtd) in both {
                term::say(format!("{order:8} {mrtd}"))?;
            }
        }
    }
    Ok(Code::Fine)
}

fn sections(tdvf: &Tdvf<'_>) -> String {
    let mut table = table(&[
        "SECTION",
        "DATA AT",
        "DATA",
        "MEMORY AT",
        "MEMORY",
        "LAUNCH",
    ]);
    for section in tdvf.sections() {
        let launch = match (section.attributes.aug, section.attributes.extend) {
            (true, _) => "later (PAGE.AUG)",
            (false, true) => "added and measured",
            (false, false) => "added",
        };
        let data = if section.raw_size == 0 {
            ["-".to_owned(), "-".to_owned()]
        } else {
            [section.data_offset, section.raw_size].map(|n| format!("{n:#x}"))
        };
        let [at, bytes] = data;
        table.add_row([
            section.kind.name(),
            &at,
            &bytes,
            &format!("{:#x}", section.memory_address),
            &format!("{:#x}", section.memory_size),
            launch,
        ]);
    }
    let pages = tdvf.launch().page_count();
    format!(
        "{}\n\n{pages} pages are added before the launch",
        finish(table)
    )
}
