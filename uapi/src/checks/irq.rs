//! Interrupts and events: routes, messages, lines, irqfds, ioeventfds, and the state of the chips.

use super::table;

table! {
    /// `KVM_SET_GSI_ROUTING`.
    gsi_routing "KVM_SET_GSI_ROUTING" {
        1 COPY EFAULT "the structure can be read";
        2 IRQCHIP EINVAL "an irqchip exists";
        3 COUNT EINVAL "there are at most 4096 entries";
        4 FLAGS EINVAL "flags are 0";
        5 ENTRIES EFAULT "the entries can be read";
        6 GSI EINVAL "every GSI is below 4096";
        7 ENTRY_FLAGS EINVAL "flags of an entry are 0, or, of a message, VALID_DEVID";
        8 ONCE EINVAL "a GSI has one message, or one input of each chip";
        9 KNOWN EINVAL "the entry is an input of a chip or a message";
        9 SPLIT EINVAL "a split irqchip has no chips with inputs";
        9 CHIP EINVAL "the chip exists, and has the input";
        9 ADDRESS EINVAL "with x2APIC format, bits 39:32 of a message's address are 0";
    }
}

table! {
    /// `KVM_SIGNAL_MSI`.
    signal_msi "KVM_SIGNAL_MSI" {
        1 COPY EFAULT "the structure can be read";
        2 IRQCHIP EINVAL "an irqchip exists";
        2 FLAGS EINVAL "flags are 0 or VALID_DEVID";
        3 ADDRESS EINVAL "with x2APIC format, bits 39:32 of the address are 0";
        4 TARGET EPERM "a local APIC is meant";
    }
}

table! {
    /// `KVM_IRQ_LINE` and `KVM_IRQ_LINE_STATUS`.
    irq_line "KVM_IRQ_LINE" {
        1 COPY EFAULT "the structure can be read";
        2 IRQCHIP ENXIO "an irqchip exists";
        3 COPY_BACK EFAULT "the status can be written";
    }
}

table! {
    /// `KVM_IRQFD`.
    irqfd "KVM_IRQFD" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are within DEASSIGN and RESAMPLE";
        3 RESAMPLE EINVAL "a level has a full irqchip";
        4 DESCRIPTOR EBADF "the descriptor is open";
        5 EVENT EINVAL "the descriptor is an eventfd";
        6 RESAMPLE_DESCRIPTOR EBADF "the descriptor of the end is open";
        7 RESAMPLE_EVENT EINVAL "the descriptor of the end is an eventfd";
        8 UNUSED EBUSY "the eventfd is no irqfd yet";
    }
}

table! {
    /// `KVM_IOEVENTFD` without DEASSIGN.
    ioeventfd "KVM_IOEVENTFD" {
        1 COPY EFAULT "the structure can be read";
        2 LENGTH EINVAL "the length is 0, 1, 2, 4 or 8";
        3 WRAP EINVAL "address and length do not wrap";
        4 FLAGS EINVAL "flags are known";
        5 MATCH EINVAL "a value to match has a length";
        6 DESCRIPTOR EBADF "the descriptor is open";
        7 EVENT EINVAL "the descriptor is an eventfd";
        8 UNUSED EEXIST "no other event takes the same writes";
        9 ROOM ENOSPC "the bus has fewer than 1000 devices beside such events";
    }
}

table! {
    /// `KVM_IOEVENTFD` with DEASSIGN.
    ioeventfd_end "KVM_IOEVENTFD (DEASSIGN)" {
        1 DESCRIPTOR EBADF "the descriptor is open";
        2 EVENT EINVAL "the descriptor is an eventfd";
        3 FOUND ENOENT "there is such an event";
    }
}

table! {
    /// `KVM_REGISTER_COALESCED_MMIO` and `KVM_UNREGISTER_COALESCED_MMIO`, which needs neither memory nor room.
    coalesced_mmio "KVM_REGISTER_COALESCED_MMIO" {
        1 COPY EFAULT "the structure can be read";
        2 PIO EINVAL "pio is 0 or 1";
        3 MEMORY ENOMEM "there is memory";
        4 ROOM ENOSPC "the bus has fewer than 1000 devices";
    }
}

table! {
    /// `KVM_GET_IRQCHIP` and `KVM_SET_IRQCHIP`.
    irqchip "KVM_GET_IRQCHIP" {
        1 COPY EFAULT "the structure can be read";
        2 FULL ENXIO "a full irqchip exists";
        3 CHIP EINVAL "the number is one of the three chips'";
        4 COPY_BACK EFAULT "the registers can be written";
    }
}

table! {
    /// `KVM_GET_PIT2` and `KVM_SET_PIT2`.
    pit2 "KVM_GET_PIT2" {
        1 COPY EFAULT "the structure can be read";
        2 EXISTS ENXIO "the timer exists";
        3 COPY_BACK EFAULT "the registers can be written";
    }
}

table! {
    /// `KVM_GET_LAPIC` and `KVM_SET_LAPIC`.
    lapic "KVM_GET_LAPIC" {
        1 APIC EINVAL "the vCPU has a local APIC";
        2 COPY EFAULT "the registers can be read";
        3 PROTECTED EINVAL "the guest's registers are no secret";
        4 ID EINVAL "in x2APIC mode, and with x2APIC format, the number is the vCPU's";
        5 COPY_BACK EFAULT "the registers can be written";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_X2APIC_API`.
    x2apic_api "KVM_CAP_X2APIC_API" {
        1 FLAGS EINVAL "the flags are known";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_X86_APIC_BUS_CYCLES_NS`.
    apic_bus_cycles "KVM_CAP_X86_APIC_BUS_CYCLES_NS" {
        1 RANGE EINVAL "the time is not 0, and 2^39 of it are below 2^64 ns";
        2 IRQCHIP ENXIO "an irqchip exists";
        3 NO_VCPU EINVAL "no vCPU exists";
    }
}

table! {
    /// `KVM_X86_SETUP_MCE`.
    setup_mce "KVM_X86_SETUP_MCE" {
        1 COPY EFAULT "the value can be read";
        2 BANKS EINVAL "there are 1 to 32 banks";
        3 FEATURES EINVAL "the features are supported";
    }
}
