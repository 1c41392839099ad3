//! The life of one VM with little memory: built and measured, run, destroyed; for every technology.

use std::error::Error;

use kvm_ops::guest::FnProgram;
use kvm_ops::sim::SimHost;
use kvm_ops::{Exit, Kind, Tech, VcpuId};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig};
use soft_amd_sp::Operation;

use super::figures::{Lives, SmallLife, SmallPhase};
use super::{Plan, clock, td, touch};

/// The memory of the VMs, in bytes.
pub const MEMORY: u64 = 1 << 20;

const PHASES: [&str; 3] = ["build", "run", "destroy"];

/// The number of calls to the firmware so far, and of instructions for it.
#[derive(Clone, Copy, Debug, Default)]
struct Calls {
    firmware: u64,
    instructions: u64,
}

fn calls(host: &SimHost, tech: Tech) -> Calls {
    // A platform starts at its first use; normal VMs never start one.
    if !tech.is_confidential() {
        return Calls::default();
    }
    if let Some(platform) = host.tdx_platform() {
        return Calls {
            firmware: td::seamcalls(platform).values().sum(),
            instructions: 0,
        };
    }
    let mut calls = Calls::default();
    if let Some(platform) = host.sev_platform() {
        for (operation, _, n) in platform.counters().iter() {
            match operation {
                Operation::Instruction(_) => calls.instructions += n,
                _ => calls.firmware += n,
            }
        }
    }
    calls
}

/// Builds a machine with a guest that says hello.
pub fn build(host: &SimHost, tech: Tech) -> Result<Machine<SimHost>, Box<dyn Error>> {
    let mut config = MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(MEMORY)
        .program(FnProgram(touch::hello()));
    if tech.is_confidential() {
        let page = LaunchPage::measured(touch::GREETING, Box::new([0x5a; 4096]));
        config = config.launch(vec![page]);
    }
    Ok(Machine::build(host, config)?)
}

/// Runs the machine to its end.
pub fn run(machine: &mut Machine<SimHost>) -> Result<(), Box<dyn Error>> {
    let vcpu = machine.vcpu_mut(VcpuId(0)).ok_or("no vCPU")?;
    let mut printed = 0;
    loop {
        match vcpu.vcpu_run()? {
            Exit::Shutdown if printed == 1 => return Ok(()),
            Exit::IoOut { .. } if vcpu.exit_data() == b"!" => printed += 1,
            Exit::Interrupted => {}
            other => return Err(format!("the guest left with {other:?}").into()),
        }
    }
}

/// Destroys the machine, and checks that nothing leaked.
pub fn destroy(machine: Machine<SimHost>) -> Result<(), Box<dyn Error>> {
    let report = machine.destroy();
    match report.is_clean() {
        true => Ok(()),
        false => Err(format!("the VM left something behind: {report:?}").into()),
    }
}

struct Row {
    tech: Tech,
    host: SimHost,
    ns: [Vec<f64>; PHASES.len()],
    calls: [Calls; PHASES.len()],
}

impl Row {
    fn new(tech: Tech) -> Result<Self, Box<dyn Error>> {
        let vendor = tech.vendor().ok_or("not a technology of this project")?;
        Ok(Self {
            tech,
            host: SimHost::new(vendor),
            ns: Default::default(),
            calls: Default::default(),
        })
    }

    fn life(&mut self, counted: bool) -> Result<(), Box<dyn Error>> {
        let mut before = calls(&self.host, self.tech);
        let mut at = clock::processor_time();
        let mut times = Vec::new();
        let mut made = Vec::new();
        let host = self.host.clone();
        let mut note = |tech| {
            times.push((clock::processor_time() - at).as_nanos() as f64);
            let now = calls(&host, tech);
            made.push(Calls {
                firmware: now.firmware - before.firmware,
                instructions: now.instructions - before.instructions,
            });
            before = now;
            at = clock::processor_time();
        };
        let mut machine = build(&self.host, self.tech)?;
        note(self.tech);
        run(&mut machine)?;
        note(self.tech);
        destroy(machine)?;
        note(self.tech);
        if counted {
            for (phase, (ns, made)) in times.into_iter().zip(made).enumerate() {
                self.ns[phase].push(ns);
                self.calls[phase].firmware += made.firmware;
                self.calls[phase].instructions += made.instructions;
            }
        }
        Ok(())
    }
}

/// Measures every technology, in interleaved rounds.
pub fn measure(plan: &Plan, lives: &mut Lives) -> Result<(), Box<dyn Error>> {
    let mut rows: Vec<Row> = Tech::ALL
        .into_iter()
        .map(Row::new)
        .collect::<Result<_, _>>()?;
    let rounds = plan.rounds.max(1);
    for round in 0..=rounds {
        for row in &mut rows {
            // The first life also starts the platform.
            row.life(round > 0)
                .map_err(|error| format!("{}: {error}", row.tech))?;
        }
    }
    for row in rows {
        let each = |n: u64| n as f64 / rounds as f64;
        let phase = |(n, name): (usize, &&str)| SmallPhase {
            name: (*name).to_owned(),
            ns: clock::quantile(&row.ns[n], 0.25),
            firmware: each(row.calls[n].firmware),
            instructions: each(row.calls[n].instructions),
        };
        let life = SmallLife {
            tech: row.tech.to_string(),
            rounds,
            phases: PHASES.iter().enumerate().map(phase).collect(),
        };
        println!("{}", life.tech);
        for phase in &life.phases {
            println!(
                "  {:<8} {:>9.1} us {:>7.2} firmware calls {:>7.2} instructions",
                phase.name,
                phase.ns / 1e3,
                phase.firmware,
                phase.instructions
            );
        }
        lives.small.push(life);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host without other VMs: no flush is deferred.
    #[test]
    fn a_small_life_makes_so_many_firmware_calls() {
        for (tech, firmware) in [
            (Tech::Vmx, [0, 0, 0]),
            // The creation on a new machine, a page with its three tables and 16 TDH.MR.EXTENDs; a
            // print, and the end of the guest.
            (Tech::Tdx, [26 + 1 + 3 + 16, 2, 23]),
            (Tech::Svm, [0, 0, 0]),
            // DEACTIVATE and DECOMMISSION at the end; SNP_DECOMMISSION and a reclaim for SNP.
            (Tech::Sev, [7, 0, 2]),
            (Tech::SevEs, [9, 0, 2]),
            (Tech::SevSnp, [6, 0, 2]),
        ] {
            let mut row = Row::new(tech).expect("a technology of this project");
            row.life(true).expect("a life");
            assert_eq!(row.calls.map(|calls| calls.firmware), firmware, "{tech}");
        }
    }
}
