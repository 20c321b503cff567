package check

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// probe tries one feature of the kernel.
type probe struct {
	name, use   string
	level       Level // when it is not there
	consequence string
	try         func() error
}

const (
	noAgent  = "the agent does not start"
	noTables = "the agent holds no egress IP, and its pods' egress traffic is dropped"
)

var probes = []probe{
	{"policy-routing", "the way to a gateway", Missing, noAgent, func() error {
		_, err := netlink.RuleList(unix.AF_INET)
		return err
	}},
	{"vxlan-gbp", "the overlay between nodes", Missing, noAgent, tryVXLAN},
	{"dummy", "the link of the egress IPs", Warning, "a bridge without ports takes its place", func() error {
		return addLink(&netlink.Dummy{LinkAttrs: named("t-dummy")})
	}},
	{"bridge", "the link of the egress IPs, where there is no dummy", Warning, "without it and without dummy, no egress IP can be held", func() error {
		return addLink(&netlink.Bridge{LinkAttrs: named("t-bridge")})
	}},
	{"vlan", "pools with a VLAN", Warning, "this node cannot hold the IPs of pools with a VLAN", tryVLAN},
	{"nft-inet-nat", "SNAT", Missing, noTables, func() error {
		return tryChain(nftables.TableFamilyINet, &nftables.Chain{
			Name: "nat", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
	}},
	{"nft-maps", "one element a pod and an egress IP", Missing, noTables, func() error {
		return trySet(&nftables.Set{Name: "m", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeMark})
	}},
	{"nft-timeouts", "permits that end by themselves", Missing, noTables, func() error {
		return trySet(&nftables.Set{Name: "s", HasTimeout: true, KeyType: nftables.TypeIPAddr})
	}},
	{"nft-ct", "knowing the connections of selected pods", Missing, noTables, func() error {
		return tryChain(nftables.TableFamilyINet, &nftables.Chain{
			Name: "ct", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
		}, &expr.Ct{Key: expr.CtKeyMARK, Register: 1})
	}},
	{"nft-arp", "being silent about egress IPs of other nodes", Missing, noTables, func() error {
		return tryChain(nftables.TableFamilyARP, &nftables.Chain{
			Name: "arp", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
		})
	}},
	{"conntrack-netlink", "moves that open connections notice", Missing, noTables, func() error {
		_, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		return err
	}},
}

func named(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func addLink(l netlink.Link) error {
	if err := netlink.LinkAdd(l); err != nil {
		return fmt.Errorf("making a link of type %s: %w", l.Type(), err)
	}
	return nil
}

func tryVXLAN() error {
	const name = "t-vxlan"
	if err := addLink(&netlink.Vxlan{LinkAttrs: named(name), VxlanId: egress.OverlayVNI, Port: egress.OverlayPort, GBP: true}); err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if v, ok := l.(*netlink.Vxlan); !ok || !v.GBP {
		return errors.New("the kernel makes the link without group policy")
	}
	return nil
}

func tryVLAN() error {
	parent := &netlink.Veth{LinkAttrs: named("t-veth"), PeerName: "t-peer"}
	if err := addLink(parent); err != nil {
		return err
	}
	a := named("t-vlan")
	a.ParentIndex = parent.Index
	return addLink(&netlink.Vlan{LinkAttrs: a, VlanId: 7})
}

func trySet(s *nftables.Set) error {
	return tryTable(nftables.TableFamilyINet, s.Name, func(c *nftables.Conn, t *nftables.Table) error {
		s.Table = t
		return c.AddSet(s, nil)
	})
}

// tryTable makes a table with what is in it.
func tryTable(family nftables.TableFamily, name string, in func(*nftables.Conn, *nftables.Table) error) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	if err := in(c, c.AddTable(&nftables.Table{Name: name, Family: family})); err != nil {
		return err
	}
	return c.Flush()
}

func tryChain(family nftables.TableFamily, chain *nftables.Chain, exprs ...expr.Any) error {
	return tryTable(family, chain.Name, func(c *nftables.Conn, t *nftables.Table) error {
		chain.Table = t
		c.AddChain(chain)
		if len(exprs) > 0 {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
		}
		return nil
	})
}
