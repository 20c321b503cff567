package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Check reports what the kernel, in the network namespace of the calling thread, lacks of what the tables take: of each
// table what it refuses first, in words that name it, all joined. It is asked for the tables under another name, in
// transactions that do not end, which the kernel looks at and drops. Chains of links are asked for at lo, which is
// there.
func Check() error {
	nl, err := dial()
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	w := writer{nl: nl}
	var errs []error
	for _, t := range tables(State{
		FirstPacketDelay: time.Second, OverlayMTU: 1450, Peers: map[int]netip.Addr{1: {}}, Renewal: NewRenewal(time.Second, time.Second),
	}) {
		t.name += "-check"
		t.chains, t.sets = slices.Clone(t.chains), slices.Clone(t.sets)
		for i := range t.sets {
			t.sets[i].size = min(t.sets[i].size, 1) // the kernel makes room for as many at once: 23 MB in all
		}
		for i := range t.chains {
			if t.chains[i].hook.device != "" {
				t.chains[i].hook.device = "lo"
			}
		}
		errs = append(errs, lacking(w.send(t.rebuild(observedTable{}), false)))
	}
	return errors.Join(append(errs, nl.Close())...)
}

// lacking says what a kernel has to have for what it refused.
func lacking(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("not allowed to change nftables (CAP_NET_ADMIN): %w", err)
	}
	has := "Linux 5.16 with nf_tables has it"
	for _, s := range []struct{ words, config string }{
		{"hook egress", "NETFILTER_EGRESS"}, {" fib ", "NFT_FIB_INET"}, {" limit ", "NFT_LIMIT"}, {"type nat", "NFT_NAT"}, {" snat ", "NFT_NAT"},
		{" ct ", "NFT_CT"}, {" arp egret", "NF_TABLES_ARP"}, {" netdev egret", "NF_TABLES_NETDEV"}, {" inet egret", "NF_TABLES_INET"},
	} {
		if strings.Contains(err.Error(), s.words) {
			has = "Linux 5.16 with CONFIG_" + s.config + " has it"
			break
		}
	}
	return fmt.Errorf("kernel without what the nftables tables take (%s): %w", has, err)
}
