package routing

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The link that Check makes and removes. Its VNI is not that of the overlay, because the kernel allows each only once
// for a port.
const (
	checkLink = "egret.check"
	checkVNI  = 0xffffff
)

// Check reports what the kernel, in the network namespace of the calling thread, lacks of what this package needs: each
// in words that name it, all joined. Unless the overlay link shows that all is there, it makes a link for a moment.
func Check() error {
	var errs []error
	if _, err := whole("rules", func() ([]netlink.Rule, error) { return netlink.RuleList(unix.AF_INET) }); err != nil {
		errs = append(errs, fmt.Errorf("kernel without policy routing (CONFIG_IP_MULTIPLE_TABLES): %w", err))
	}
	if l, err := netlink.LinkByName(egress.OverlayLink); err != nil || !hasGBP(l) {
		errs = append(errs, checkVXLAN())
	}
	return errors.Join(errs...)
}

func checkVXLAN() (err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = checkLink
	want := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: checkVNI, Port: egress.OverlayPort, GBP: true}
	// What a check that was killed has left is as good as a new one.
	switch err := netlink.LinkAdd(want); {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("not allowed to make links (CAP_NET_ADMIN): %w", err)
	case err != nil && !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("kernel without VXLAN group policy (CONFIG_VXLAN): making a vxlan link: %w", err)
	}
	made, err := netlink.LinkByName(checkLink)
	if err != nil {
		return fmt.Errorf("reading the vxlan link that was made: %w", err)
	}
	if err := netlink.LinkDel(made); err != nil {
		return fmt.Errorf("removing the vxlan link that was made: %w", err)
	}
	if !hasGBP(made) {
		return errors.New("kernel without VXLAN group policy: it makes a vxlan link without it (Linux 4.0 has it)")
	}
	return nil
}

func hasGBP(l netlink.Link) bool {
	v, ok := l.(*netlink.Vxlan)
	return ok && v.GBP
}
