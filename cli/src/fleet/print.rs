//! A fleet's report as text: a table, the problems, and the sums.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color, Table, presets};

use crate::term::{self, BOLD, ERROR};
use crate::units::{self, plural};

use super::report::{FleetReport, Status, VmReport};

/// The width of a guest's last line of output, at least and at most.
const LAST_WORDS: std::ops::RangeInclusive<usize> = 12..=60;

/// The table's column with the last line of output.
const LAST_COLUMN: usize = 8;

/// Formats the report.
pub(crate) fn text(report: &FleetReport) -> String {
    let mut lines: Vec<String> = vec![table(report).trim_fmt(), String::new()];
    for vm in &report.vms {
        let mark = match vm.status {
            Status::Skipped => "left out".to_owned(),
            _ => format!("{ERROR}failed{ERROR:#}"),
        };
        let problems = vm.problems.iter().map(|problem| (mark.clone(), problem));
        let leaks = vm
            .leaks
            .iter()
            .map(|leak| (format!("{ERROR}leaked{ERROR:#}"), leak));
        lines.extend(
            problems
                .chain(leaks)
                .map(|(mark, what)| format!("{mark}: {}: {what}", vm.name)),
        );
    }
    if lines.len() > 2 {
        lines.push(String::new());
    }
    lines.push(sums(report));
    for account in &report.firmware {
        lines.push(format!("\n{account}"));
    }
    lines.join("\n")
}

fn table(report: &FleetReport) -> Table {
    let columns = term::columns().map(usize::from);
    let gap = if columns.is_some_and(|columns| columns < 100) {
        1
    } else {
        2
    };
    // First without the last lines of output, to see how much room is left for them.
    let rest = filled(report, gap, 0);
    let used: usize = rest.column_max_content_widths()[..LAST_COLUMN]
        .iter()
        .map(|width| usize::from(width + gap))
        .sum();
    let (least, most) = LAST_WORDS.into_inner();
    let room = columns.map_or(most, |columns| columns.saturating_sub(used));
    filled(report, gap, room.clamp(least, most))
}

fn filled(report: &FleetReport, gap: u16, words: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if term::colours_out() {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table.set_header([
        "NAME",
        "TECH",
        "HOST",
        "VCPUS",
        "MEM",
        "EXITS",
        "TIME",
        "OUTCOME",
        "LAST WORDS",
    ]);
    for vm in &report.vms {
        table.add_row(row(vm, words));
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if i == LAST_COLUMN { 0 } else { gap }));
        if (3..=6).contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn row(vm: &VmReport, words: usize) -> Vec<Cell> {
    let outcome = match vm.status {
        Status::Ok => Cell::new(vm.outcome),
        Status::Stopped => Cell::new("stopped"),
        Status::Skipped => Cell::new("left out"),
        Status::Failed => Cell::new("failed").fg(Color::Red),
    };
    let time = match vm.status {
        Status::Skipped => "-".to_owned(),
        _ => units::time(vm.elapsed),
    };
    vec![
        Cell::new(&vm.name),
        Cell::new(vm.tech.unwrap_or("-")),
        Cell::new(vm.host.unwrap_or("-")),
        Cell::new(vm.vcpus),
        Cell::new(units::size(vm.memory)),
        Cell::new(vm.exits),
        Cell::new(time),
        outcome,
        Cell::new(shortened(&vm.console.last_line, words)),
    ]
}

fn shortened(line: &str, most: usize) -> String {
    if line.chars().count() <= most {
        return line.to_owned();
    }
    let kept = most.saturating_sub(3);
    line.chars()
        .take(kept)
        .chain("...".chars().take(most))
        .collect()
}

fn sums(report: &FleetReport) -> String {
    let totals = &report.totals;
    let parts: Vec<_> = [
        (totals.ok, "as expected"),
        (totals.failed, "failed"),
        (totals.stopped, "stopped"),
        (totals.skipped, "left out"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect();
    let left = report.left_behind();
    let leaks = if totals.leaks == 0 && left.is_empty() {
        "nothing leaked".to_owned()
    } else {
        let mut leaks = left;
        if totals.leaks > 0 {
            leaks.insert(0, format!("{} reported by teardowns", totals.leaks));
        }
        format!("{ERROR}leaked{ERROR:#}: {}", leaks.join(", "))
    };
    let instructions = match totals.instructions {
        0 => String::new(),
        count => format!(" {count} instructions,"),
    };
    let memory = report.peak_memory.map_or(String::new(), |bytes| {
        format!(" with {} MiB of RAM at most", bytes >> 20)
    });
    format!(
        "{BOLD}{}{BOLD:#}: {}; {}, {},{instructions} {}; {leaks}; {}{memory}",
        plural(totals.vms as u64, "VM"),
        parts.join(", "),
        plural(totals.vcpus.into(), "vCPU"),
        plural(totals.exits, "exit"),
        plural(totals.pages, "page"),
        units::time(Duration::from_secs_f64(report.seconds)),
    )
}
