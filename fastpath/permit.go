package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Permit makes ips those that this node may send with, until a time that has a monotonic clock's reading, and no
// others. It is not to be later than the tables' permits. IPv6 addresses are left out.
func (p *Path) Permit(ips []netip.Addr, until time.Time) error {
	if p == nil {
		return nil
	}
	// In this order: a process that stands still in between gets an end that is earlier, not later.
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	left := time.Until(until)
	if left <= 0 {
		ips = nil
	}
	want := map[[4]byte]bool{}
	for _, ip := range ips {
		if ip.Is4() {
			want[ip.As4()] = true
		}
	}
	var gone []netip.Addr
	err = dump(p.coll.Maps["permits"], func(ip [4]byte, _ uint64) {
		if !want[ip] {
			gone = append(gone, netip.AddrFrom4(ip))
		}
	})
	errs := []error{err, p.Revoke(gone...)}
	for ip := range want {
		errs = append(errs, p.coll.Maps["permits"].Put(ip, now+uint64(left)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("writing permits of the fast path: %w", err)
	}
	return nil
}

// Revoke ends the permits of ips at once. Permits that are not there are no error.
func (p *Path) Revoke(ips ...netip.Addr) error {
	if p == nil {
		return nil
	}
	var errs []error
	for _, ip := range ips {
		if ip.Is4() {
			errs = append(errs, absent(p.coll.Maps["permits"].Delete(ip.As4())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("revoking permits of the fast path: %w", err)
	}
	return nil
}

// Permits returns how long each permit still lasts: not more than 0 where it has ended and was not renewed.
func (p *Path) Permits() (map[netip.Addr]time.Duration, error) {
	out := map[netip.Addr]time.Duration{}
	now, err := sinceBoot()
	if err == nil {
		err = dump(p.coll.Maps["permits"], func(ip [4]byte, until uint64) {
			out[netip.AddrFrom4(ip)] = time.Duration(until - now)
		})
	}
	if err != nil {
		return nil, fmt.Errorf("reading permits of the fast path: %w", err)
	}
	return out, nil
}

// sinceBoot returns CLOCK_BOOTTIME in nanoseconds, as bpf_ktime_get_boot_ns does.
func sinceBoot() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("reading the kernel's clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}
