//! The diagnosis as text.

use comfy_table::{Cell, Color, ContentArrangement, Table, presets};

use crate::term::{self, BOLD};

use super::{Capability, Diagnosis, Offer};

/// Formats the diagnosis.
pub(crate) fn text(diagnosis: &Diagnosis) -> String {
    let mut parts = vec![machine(diagnosis), technologies(diagnosis)];
    parts.extend(reasons(diagnosis));
    parts.extend(what_to_do(diagnosis));
    if !diagnosis.capabilities.is_empty() {
        parts.push(capabilities(&diagnosis.capabilities));
    }
    parts.join("\n\n")
}

/// Creates a table without lines, as wide as the terminal.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if term::colours_out() {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    if let Some(columns) = term::columns() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(columns);
    }
    if !header.is_empty() {
        table.set_header(header);
    }
    table
}

/// Formats the table, without spaces at the ends of lines.
pub(crate) fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

fn machine(diagnosis: &Diagnosis) -> String {
    let mut table = table(&[]);
    if let Some(machine) = &diagnosis.machine {
        let kind = if machine.is_virtual {
            ", a virtual machine"
        } else {
            ""
        };
        table.add_row([
            "processor",
            &format!("{} ({}){kind}", machine.model, machine.vendor),
        ]);
        let modules = match machine.kvm_modules.as_slice() {
            [] => "none loaded".to_owned(),
            modules => modules.join(", "),
        };
        table.add_row(["kernel", &machine.kernel]);
        table.add_row(["kvm modules", &modules]);
    }
    let device = match (&diagnosis.dev_kvm.error, diagnosis.dev_kvm.vm_types) {
        (Some(error), _) => format!("not usable: {error}"),
        (None, Some(types)) => format!("usable, VM types {types:#x}"),
        (None, None) => "usable".to_owned(),
    };
    table.add_row(["/dev/kvm", &device]);
    if let Some(hint) = &diagnosis.dev_kvm.hint {
        table.add_row(["", &format!("hint: {hint}")]);
    }
    table.add_row(["this build", &format!("kvm-ops {}", diagnosis.version)]);
    finish(table)
}

fn cell(offer: &Offer) -> Cell {
    let cell = Cell::new(&offer.summary);
    if offer.offered {
        cell.fg(Color::Green)
    } else {
        cell
    }
}

fn technologies(diagnosis: &Diagnosis) -> String {
    let mut table = table(&[
        "TECHNOLOGY",
        "THIS HOST",
        "KVM-OPS ON /dev/kvm",
        "SOFTWARE PLATFORM",
    ]);
    for tech in &diagnosis.technologies {
        table.add_row(vec![
            Cell::new(tech.name),
            tech.host.as_ref().map_or_else(|| Cell::new("?"), cell),
            cell(&tech.kvm),
            cell(&tech.software),
        ]);
    }
    finish(table)
}

/// The reasons for every "no", and further notes.
fn reasons(diagnosis: &Diagnosis) -> Option<String> {
    let mut table = table(&["TECHNOLOGY", "WHERE", "WHY NOT, AND NOTES"]);
    for tech in &diagnosis.technologies {
        let places = [
            ("host", tech.host.as_ref()),
            // The library cannot create what the host lacks, so this adds no reason.
            (
                "/dev/kvm",
                Some(&tech.kvm).filter(|_| tech.host.as_ref().is_none_or(|host| host.offered)),
            ),
            ("software", Some(&tech.software)),
        ];
        for (place, offer) in places {
            for line in offer
                .iter()
                .flat_map(|offer| offer.why_not.iter().chain(&offer.notes))
            {
                table.add_row([tech.name, place, line]);
            }
        }
    }
    (!table.is_empty()).then(|| finish(table))
}

/// Each piece of advice once, with the technologies that it enables.
fn what_to_do(diagnosis: &Diagnosis) -> Option<String> {
    let mut advice: Vec<(&str, Vec<&str>)> = Vec::new();
    for tech in &diagnosis.technologies {
        let offers = [tech.host.as_ref(), Some(&tech.kvm), Some(&tech.software)];
        for line in offers
            .into_iter()
            .flatten()
            .flat_map(|offer| &offer.what_to_do)
        {
            match advice.iter_mut().find(|(known, _)| known == line) {
                Some((_, techs)) if techs.contains(&tech.name) => {}
                Some((_, techs)) => techs.push(tech.name),
                None => advice.push((line, vec![tech.name])),
            }
        }
    }
    if advice.is_empty() {
        return None;
    }
    let mut table = table(&["FOR", "WHAT TO DO"]);
    for (line, techs) in advice {
        table.add_row([techs.join(", ").as_str(), line]);
    }
    Some(finish(table))
}

/// Returns true if the capability's answer is a number, not a yes or a bitmap.
fn is_number(name: &str) -> bool {
    ["KVM_CAP_NR_", "KVM_CAP_MAX_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

fn capabilities(capabilities: &[Capability]) -> String {
    let mut table = table(&["KVM_CAP_", "HERE", "WHAT FOR"]);
    for capability in capabilities {
        let here = match (capability.available, capability.errno) {
            (true, _) if is_number(capability.name) => capability.answer.to_string(),
            (true, _) if capability.answer > 1 => format!("yes ({:#x})", capability.answer),
            (true, _) => "yes".to_owned(),
            (false, Some(errno)) if capability.answer != 0 => {
                format!("says yes, refuses with errno {errno}")
            }
            (false, _) => "no".to_owned(),
        };
        let name = capability.name.trim_start_matches("KVM_CAP_");
        table.add_row([name, &here, capability.purpose]);
    }
    format!("{BOLD}Capabilities of KVM{BOLD:#}\n{}", finish(table))
}
