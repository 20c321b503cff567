package check

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	netfilter "github.com/mdlayher/netlink"
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
	dryRun      func() error // tries it without changing anything; nil: there is no way
}

const noAgent = "the agent does not start"

var probes = []probe{
	{"policy-routing", "the way to a gateway", Missing, noAgent, func() error {
		_, err := netlink.RuleList(unix.AF_INET)
		return err
	}, nil},
	{"vxlan-gbp", "the overlay between nodes", Missing, noAgent, tryVXLAN, nil},
	{"dummy", "the link of the egress IPs", Warning, "a bridge without ports takes its place", func() error {
		return addLink(&netlink.Dummy{LinkAttrs: named("t-dummy")})
	}, nil},
	{"bridge", "the link of the egress IPs, where there is no dummy", Warning, "without it and without dummy, no egress IP can be held", func() error {
		return addLink(&netlink.Bridge{LinkAttrs: named("t-bridge")})
	}, nil},
	{VLAN, "pools with a VLAN", Warning, "this node cannot hold the IPs of pools with a VLAN", tryVLAN, askVLAN},
	{"nft-inet-nat", "SNAT", Missing, noAgent, func() error {
		return tryChain(nftables.TableFamilyINet, &nftables.Chain{
			Name: "nat", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
	}, nil},
	{"nft-maps", "one element a pod and an egress IP", Missing, noAgent, func() error {
		return trySet(&nftables.Set{Name: "m", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeMark})
	}, nil},
	{"nft-timeouts", "permits that end by themselves", Missing, noAgent, func() error {
		return trySet(&nftables.Set{Name: "s", HasTimeout: true, KeyType: nftables.TypeIPAddr})
	}, nil},
	{"nft-ct", "knowing the connections of selected pods", Missing, noAgent, func() error {
		return tryChain(nftables.TableFamilyINet, &nftables.Chain{
			Name: "ct", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
		}, &expr.Ct{Key: expr.CtKeyMARK, Register: 1})
	}, nil},
	{"nft-arp", "being silent about egress IPs of other nodes", Missing, noAgent, func() error {
		return tryChain(nftables.TableFamilyARP, &nftables.Chain{
			Name: "arp", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
		})
	}, nil},
	{"nft-netdev", "silence and answers about egress IPs", Missing, noAgent, func() error {
		return tryTable(nftables.TableFamilyNetdev, "egret", func(*nftables.Conn, *nftables.Table) error { return nil })
	}, nil},
	{"nft-egress", "sending packets to another gateway (Linux 5.16)", Missing, noAgent, func() error {
		return tryChain(nftables.TableFamilyNetdev, &nftables.Chain{
			Name: "out", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookEgress, Priority: nftables.ChainPriorityFilter, Device: "lo",
		})
	}, nil},
	{"nft-owner", "tables that nobody else changes or flushes", Warning,
		"where somebody flushes all of nftables, as `systemctl restart nftables` does, selected pods of this node leave with other sources until the agent has mended that", tryOwner, dryOwner},
	{ARPAnswers, "answering ARP where arp_ignore keeps the kernel from it", Warning,
		"where net.ipv4.conf.all.arp_ignore is not 0, no neighbour finds this node's egress IPs", tryForward, dryForward},
	{"conntrack-netlink", "moves that open connections notice", Missing, noAgent, func() error {
		_, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		return err
	}, nil},
}

// VLAN is the name of the check for links of VLANs.
const VLAN = "vlan"

// ARPAnswers is the name of the check for what it takes to answer ARP in nftables.
const ARPAnswers = "nft-fwd"

// tryForward makes the rule that sends a packet back. The library has no such expression.
func tryForward() error {
	const name = "fwd"
	if err := tryChain(nftables.TableFamilyNetdev, &nftables.Chain{Name: name}); err != nil {
		return err
	}
	return commit(forward(name))
}

// forward is that rule, in a chain of a table of that name. It uses register 1, into which nothing is loaded: nothing
// calls the chain.
func forward(name string) netfilter.Message {
	forward := expressionOf("fwd", netfilter.Attribute{Type: unix.NFTA_FWD_SREG_DEV, Data: []byte{0, 0, 0, unix.NFT_REG_1}})
	load := expressionOf("meta", netfilter.Attribute{Type: unix.NFTA_META_KEY, Data: []byte{0, 0, 0, unix.NFT_META_IIF}},
		netfilter.Attribute{Type: unix.NFTA_META_DREG, Data: []byte{0, 0, 0, unix.NFT_REG_1}})
	return message(unix.NFT_MSG_NEWRULE, unix.NFPROTO_NETDEV,
		netfilter.Attribute{Type: unix.NFTA_RULE_TABLE, Data: []byte(name + "\x00")},
		netfilter.Attribute{Type: unix.NFTA_RULE_CHAIN, Data: []byte(name + "\x00")},
		netfilter.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: attributes(load, forward)})
}

// dryName is the table and the chain of transactions that are made to fail.
const dryName = "egret-check"

func dryForward() error {
	return dry(unix.NFPROTO_NETDEV,
		message(unix.NFT_MSG_NEWTABLE, unix.NFPROTO_NETDEV, netfilter.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(dryName + "\x00")}),
		message(unix.NFT_MSG_NEWCHAIN, unix.NFPROTO_NETDEV,
			netfilter.Attribute{Type: unix.NFTA_CHAIN_TABLE, Data: []byte(dryName + "\x00")}, netfilter.Attribute{Type: unix.NFTA_CHAIN_NAME, Data: []byte(dryName + "\x00")}),
		forward(dryName))
}

// owned is a table that is owned and outlives its owner. The library has no flags of tables.
func owned(name string) netfilter.Message {
	const ownerAndPersist = 1<<1 | 1<<2 // linux/netfilter/nf_tables.h
	return message(unix.NFT_MSG_NEWTABLE, unix.NFPROTO_INET,
		netfilter.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(name + "\x00")},
		netfilter.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, ownerAndPersist}})
}

func tryOwner() error { return commit(owned("owner")) }
func dryOwner() error { return dry(unix.NFPROTO_INET, owned(dryName)) }

// message is one of a transaction of nftables.
func message(typ int, family byte, data ...netfilter.Attribute) netfilter.Message {
	return netfilter.Message{
		Header: netfilter.Header{Type: netfilter.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netfilter.Request | netfilter.Create},
		Data:   append([]byte{family, 0, 0, 0}, attributes(data...)...),
	}
}

// commit sends a transaction. The last message is answered in any case, and others where they fail.
func commit(messages ...netfilter.Message) error {
	c, err := netfilter.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	frame := func(typ int) netfilter.Message {
		return netfilter.Message{Header: netfilter.Header{Type: netfilter.HeaderType(typ), Flags: netfilter.Request}, Data: []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	messages[len(messages)-1].Header.Flags |= netfilter.Acknowledge
	batch := append([]netfilter.Message{frame(unix.NFNL_MSG_BATCH_BEGIN)}, messages...)
	if _, err = c.SendMessages(append(batch, frame(unix.NFNL_MSG_BATCH_END))); err == nil {
		_, err = c.Receive()
	}
	return err
}

// dry has the kernel go through a transaction, and then give it up: the last message is one that cannot be, a table
// that must not be there yet.
func dry(family byte, messages ...netfilter.Message) error {
	last := message(unix.NFT_MSG_NEWTABLE, family, netfilter.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(dryName + "\x00")})
	last.Header.Flags |= netfilter.Excl
	err := commit(append(messages, last)...)
	if errors.Is(err, unix.EEXIST) { // the first that failed
		return nil
	}
	return err
}

// askVLAN asks for a VLAN link on no other. A kernel without VLANs does not get as far as to refuse that.
func askVLAN() error {
	err := netlink.LinkAdd(&netlink.Vlan{LinkAttrs: named("t-vlan"), VlanId: 7})
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

func expressionOf(name string, data ...netfilter.Attribute) netfilter.Attribute {
	return netfilter.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: attributes(
		netfilter.Attribute{Type: unix.NFTA_EXPR_NAME, Data: []byte(name + "\x00")},
		netfilter.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: attributes(data...)})}
}

// attributes encodes what is known to fit.
func attributes(list ...netfilter.Attribute) []byte {
	b, err := netfilter.MarshalAttributes(list)
	if err != nil {
		panic(err) // only for attributes of 64 KiB
	}
	return b
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
