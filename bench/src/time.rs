//! Times all designs side by side in one run.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use crate::designs::fleet::{Fleet, OPS};
use crate::designs::form::PLACEMENTS;
use crate::designs::registry::{Entry, FORMS, Run};
use crate::figures::{self, Figures, KvmTimes, Time};
use crate::kvm::Kvm;
use crate::system;

struct Design {
    entry: &'static Entry,
    fleet: Fleet,
    run: Run,
    /// For each placement, one time per round.
    ns: [Vec<f64>; PLACEMENTS],
}

/// Measures every design and writes the figures.
///
/// The rounds are interleaved, so that a slow moment of the machine affects all designs alike. The
/// slower half of the rounds, by the time of the direct call, is dropped: in those, another program
/// ran or the processor's clock was low.
pub fn write(out: &Path, rounds: usize) -> Result<(), Box<dyn Error>> {
    let mut designs: Vec<Design> = FORMS
        .iter()
        .flat_map(|entry| entry.fleets().map(move |fleet| (entry, fleet)))
        .map(|(entry, fleet)| Design {
            entry,
            fleet,
            run: (entry.build)(&fleet.techs()),
            ns: Default::default(),
        })
        .collect();
    let mut kvm = match Kvm::open() {
        Ok(kvm) => Some((kvm, Vec::new(), Vec::new())),
        Err(error) => {
            eprintln!("without /dev/kvm, so no real operations beside the designs: {error}");
            None
        }
    };

    for round in 0..rounds.max(2) {
        let orders = Fleet::ALL.map(|fleet| (fleet, fleet.order(round as u64)));
        for design in &mut designs {
            let Some((_, order)) = orders.iter().find(|(fleet, _)| *fleet == design.fleet) else {
                continue;
            };
            for (placement, ns) in design.ns.iter_mut().enumerate() {
                let start = Instant::now();
                black_box((design.run)(placement, order));
                ns.push(start.elapsed().as_nanos() as f64 / OPS as f64);
            }
        }
        if let Some((kvm, ioctls, exits)) = &mut kvm {
            ioctls.push(kvm.ioctl_ns());
            exits.push(kvm.exit_ns()?);
        }
    }

    let quiet = quiet_rounds(&designs);
    let figures = Figures {
        cpu: system::cpu(),
        kernel: system::kernel()?,
        rustc: env!("KVM_OPS_BENCH_RUSTC").to_owned(),
        aligned_branches: cfg!(kvm_ops_bench_aligned),
        rounds: quiet.len(),
        operations: OPS,
        times: designs
            .iter()
            .map(|design| summary(design, &quiet))
            .collect(),
        kvm: kvm.map(|(_, ioctls, exits)| KvmTimes {
            ioctl: fastest(&ioctls),
            exit: fastest(&exits),
        }),
    };
    figures::write(out, &figures)
}

fn quiet_rounds(designs: &[Design]) -> Vec<usize> {
    let direct: Vec<&Design> = designs
        .iter()
        .filter(|d| d.entry.form == "direct")
        .collect();
    let rounds = direct.first().map_or(0, |d| d.ns[0].len());
    let mut by_time: Vec<(f64, usize)> = (0..rounds)
        .map(|round| {
            (
                direct.iter().flat_map(|d| &d.ns).map(|ns| ns[round]).sum(),
                round,
            )
        })
        .collect();
    by_time.sort_by(|a, b| a.0.total_cmp(&b.0));
    by_time.truncate(rounds.div_ceil(2));
    by_time.into_iter().map(|(_, round)| round).collect()
}

/// The lower quartile: on a busy machine a run of milliseconds is often interrupted, and longer
/// runs more often.
fn quartile_of(ns: &[f64], rounds: &[usize]) -> f64 {
    let mut kept: Vec<f64> = rounds.iter().map(|&round| ns[round]).collect();
    kept.sort_by(f64::total_cmp);
    kept[kept.len() / 4]
}

/// The fastest round. As the base of the designs' share it errs on the side of a larger share.
fn fastest(ns: &[f64]) -> f64 {
    ns.iter().copied().fold(f64::INFINITY, f64::min)
}

fn summary(design: &Design, quiet: &[usize]) -> Time {
    let placements = design.ns.each_ref().map(|ns| quartile_of(ns, quiet));
    let round = |ns: f64| (ns * 1000.0).round() / 1000.0;
    Time {
        form: design.entry.form.to_owned(),
        body: design.entry.body,
        fleet: design.fleet,
        ns: round(placements.iter().sum::<f64>() / PLACEMENTS as f64),
        low: round(placements.iter().copied().fold(f64::INFINITY, f64::min)),
        high: round(placements.iter().copied().fold(0.0, f64::max)),
    }
}
