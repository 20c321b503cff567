package lab

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The two addresses of a packet.
type addressField int

const (
	sourceField addressField = iota
	destinationField
)

// matchAddress returns the expressions of `ip saddr <prefix>` and the like.
func matchAddress(field addressField, op expr.CmpOp, p netip.Prefix) []expr.Any {
	proto, offset := byte(unix.NFPROTO_IPV4), []uint32{12, 16} // RFC 791, section 3.1
	if !p.Addr().Is4() {
		proto, offset = unix.NFPROTO_IPV6, []uint32{8, 24} // RFC 8200, section 3
	}
	size := uint32(p.Addr().BitLen() / 8)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset[field], Len: size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: ipNet(p).Mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// addMasquerade adds what a simple CNI leaves behind: masquerading of everything that leaves the pod network.
func addMasquerade(ns netns.NsHandle) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "cni"})
	chain := c.AddChain(&nftables.Chain{
		Table: table, Name: "postrouting", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	for _, f := range families() {
		match := append(matchAddress(sourceField, expr.CmpOpEq, f.cluster), matchAddress(destinationField, expr.CmpOpNeq, f.cluster)...)
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(match, &expr.Masq{})})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("adding table inet cni: %w", err)
	}
	return nil
}

// dropTraffic drops, in a namespace, everything to and from some addresses; a name with -in or -out at its end, one of
// the two. The name tells one such set from another.
func dropTraffic(ns netns.NsHandle, name string, addrs []netip.Addr) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"})
	for _, d := range []struct {
		suffix string
		hook   *nftables.ChainHook
		field  addressField
	}{{"-in", nftables.ChainHookPrerouting, sourceField}, {"-out", nftables.ChainHookOutput, destinationField}} {
		base, direction, one := strings.Cut(name, "-")
		if one && d.suffix != "-"+direction {
			continue
		}
		chain := c.AddChain(&nftables.Chain{
			Table: table, Name: base + d.suffix, Type: nftables.ChainTypeFilter, Hooknum: d.hook, Priority: nftables.ChainPriorityRaw,
		})
		c.FlushChain(chain) // a second cut changes nothing
		for _, a := range addrs {
			match := matchAddress(d.field, expr.CmpOpEq, netip.PrefixFrom(a, a.BitLen()))
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(match, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("adding chains %s to table inet lab: %w", name, err)
	}
	return nil
}

// passTraffic undoes dropTraffic. Nil when there is nothing to undo.
func passTraffic(ns netns.NsHandle, name string) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("listing chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Table.Name == "lab" && (chain.Name == name || chain.Name == name+"-in" || chain.Name == name+"-out") {
			c.FlushChain(chain)
			c.DelChain(chain)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("removing chains %s from table inet lab: %w", name, err)
	}
	return nil
}
