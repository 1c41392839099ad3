//! Prints what this host offers: `cargo run -p kvm-ops-kvm --example offer`.

use kvm_ops_kvm::{KvmHost, Offer};

fn main() {
    let offer = match KvmHost::open() {
        Ok(host) => host.offer(),
        Err(error) => {
            println!("{error}\nhint: {}\n", error.hint());
            Offer::without_device(&error)
        }
    };
    println!("processor  {}", offer.machine.model);
    for module in offer.machine.modules.keys() {
        println!("module     {module}");
    }
    for line in &offer.technologies {
        let verdict = if line.is_offered() { "yes" } else { "no" };
        println!("{:10} {verdict}", line.tech);
        for reason in &line.why_not {
            println!("           - {reason}");
        }
        for note in &line.notes {
            println!("           * {note}");
        }
    }
    for capability in &offer.capabilities {
        let verdict = match (capability.is_available(), capability.answer) {
            (true, 0 | 1) => "yes".to_owned(),
            (true, number) => number.to_string(),
            (false, 0) => "no".to_owned(),
            (false, _) => format!("claimed, but {:?}", capability.tried),
        };
        println!("{:34} {verdict:24} {}", capability.name, capability.purpose);
    }
}
