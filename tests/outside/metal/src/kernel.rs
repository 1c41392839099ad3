//! The kernel around the library: an allocator, a panic handler and the first instruction.

use core::hint::{black_box, spin_loop};
use core::panic::PanicInfo;
use core::ptr::addr_of_mut;

use kvm_ops::Vendor;
use kvm_ops_guest::instructions::Tdcall;
use kvm_ops_guest::tdx::TdGuest;
use linked_list_allocator::LockedHeap;
use metal::Metal;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

static mut MEMORY: [u8; 1 << 20] = [0; 1 << 20];

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        spin_loop();
    }
}

/// Uses every part once. `black_box` keeps the results, and so the code that computes them.
#[unsafe(no_mangle)]
pub extern "C" fn _start() -> ! {
    // SAFETY: this runs once, before anything allocates, and nothing else names `MEMORY`.
    unsafe {
        HEAP.lock().init(addr_of_mut!(MEMORY).cast::<u8>(), 1 << 20);
    }
    for vendor in [Vendor::Intel, Vendor::Amd] {
        black_box(metal::console(&Metal::new(vendor)).is_ok());
        black_box(metal::confidential(vendor));
    }
    black_box(metal::mrtd(black_box(&[0; 4096])).is_ok());
    black_box(metal::halts_after(black_box([0xf4; 16])));
    // SAFETY: this kernel runs at privilege level 0, and it owns all memory of its TD.
    let port = unsafe { Tdcall::new() };
    if let Ok(mut td) = TdGuest::new(port) {
        black_box(metal::share(&mut td, 0x10_0000, 1).is_ok());
    }
    panic!("nothing is left to do")
}
