//! Several VMs at once, from one thread and from two.

use std::error::Error;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use kvm_ops::Tech;
use kvm_ops::sim::SimHost;

use super::figures::{Lives, Many};
use super::{Plan, clock, small};

/// The number of VMs alive at once. [`host`] has more KeyIDs and ASIDs of each kind.
const VMS: usize = 24;
const THREADS: [usize; 2] = [1, 2];

fn host(tech: Tech) -> Result<SimHost, Box<dyn Error>> {
    let builder = SimHost::builder(tech.vendor().ok_or("not a technology of this project")?);
    let tdx = soft_tdx_module::Platform::builder().seed(1);
    // ASIDs 1 to 63 are for SEV-ES and SNP, 64 to 127 for SEV.
    let sev = soft_amd_sp::Platform::builder().seed(1).asids(64, 127);
    Ok(builder.tdx(tdx).sev(sev).build()?)
}

struct Column {
    tech: Tech,
    threads: usize,
    host: SimHost,
    wall: Vec<f64>,
    processor: Vec<f64>,
}

/// Builds one thread's share of the VMs, waits until all threads have theirs, and ends them.
fn share(host: &SimHost, tech: Tech, vms: usize, all: &Barrier) -> Result<f64, String> {
    let start = clock::processor_time();
    let built: Result<Vec<_>, _> = (0..vms).map(|_| small::build(host, tech)).collect();
    // Every thread waits here even after a failure; otherwise the others would wait without end.
    all.wait();
    let mut machines = built.map_err(|error| error.to_string())?;
    for machine in &mut machines {
        small::run(machine).map_err(|error| error.to_string())?;
    }
    for machine in machines {
        small::destroy(machine).map_err(|error| error.to_string())?;
    }
    Ok((clock::processor_time() - start).as_nanos() as f64)
}

impl Column {
    fn round(&mut self) -> Result<(), Box<dyn Error>> {
        let all = Barrier::new(self.threads);
        let (host, tech, vms) = (&self.host, self.tech, VMS / self.threads);
        let start = Instant::now();
        let times: Vec<Result<f64, String>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|_| scope.spawn(|| share(host, tech, vms, &all)))
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            ended
                .map(|end| end.unwrap_or_else(|_| Err("a thread ended badly".to_owned())))
                .collect()
        });
        self.wall.push(start.elapsed().as_nanos() as f64);
        let mut sum = 0.0;
        for time in times {
            sum += time?;
        }
        self.processor.push(sum);
        Ok(())
    }
}

/// Measures every technology with each number of threads, in interleaved rounds.
pub fn measure(plan: &Plan, lives: &mut Lives) -> Result<(), Box<dyn Error>> {
    let mut columns = Vec::new();
    for tech in Tech::ALL {
        for threads in THREADS {
            columns.push(Column {
                tech,
                threads,
                host: host(tech)?,
                wall: Vec::new(),
                processor: Vec::new(),
            });
        }
    }
    for _ in 0..=plan.rounds.max(1) {
        for column in &mut columns {
            let what = format!("{} on {} threads", column.tech, column.threads);
            column.round().map_err(|error| format!("{what}: {error}"))?;
        }
    }
    for column in columns {
        let each = |ns: f64| ns / VMS as f64;
        let many = Many {
            tech: column.tech.to_string(),
            vms: VMS as u64,
            threads: column.threads as u64,
            // The first round also starts the platform.
            wall_ns: each(clock::quantile(&column.wall[1..], 0.0)),
            processor_ns: each(clock::quantile(&column.processor[1..], 0.5)),
        };
        println!(
            "{:<8} {} VMs, {} threads: {:>8.1} us on the clock, {:>8.1} us of processors, each",
            many.tech,
            many.vms,
            many.threads,
            many.wall_ns / 1e3,
            many.processor_ns / 1e3
        );
        lives.many.push(many);
    }
    Ok(())
}
