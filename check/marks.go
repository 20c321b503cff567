package check

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"

	"github.com/egret-project/egret/egress"
)

// chain is a chain with its rules.
type chain struct {
	*nftables.Chain
	rules []*nftables.Rule
}

// chainsOfOthers returns the nftables chains of others. Those of the legacy iptables are not looked at.
func chainsOfOthers() (out []chain, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("listing chains: %w", err)
	}
	for _, ch := range chains {
		if ours(ch.Table) {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("listing the rules of %s: %w", nameOf(ch), err)
		}
		out = append(out, chain{ch, rules})
	}
	return out, nil
}

// ours reports whether a table is Egret's: also one of a trace, which is there for seconds.
func ours(t *nftables.Table) bool {
	return t.Name == egress.TableName || t.Name == egress.TraceTableName
}

// marksOfOthers returns the ip rules and the chains that read or write bits of the packet mark that are Egret's: of
// rules also those of an id, which is the mark of a packet between nodes while the kernel looks for its way. A packet
// whose routing mark gets IDBit beside it goes nowhere; who clears that bit, or sets it after the route lookup, is not
// in the way.
func marksOfOthers(chains []chain) (out []string, err error) {
	all, err := rules()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		mask := uint32(0xffffffff)
		if r.Mask != nil {
			mask = *r.Mask
		}
		if r.Mark != 0 && uint32(egress.RuleMask|egress.Mark(egress.MaxID))&mask != 0 {
			out = append(out, fmt.Sprintf("rule %d fwmark 0x%x/0x%x", r.Priority, r.Mark, mask))
		}
	}
	first := comesFirst(chains)
	return append(out, chainsThat(chains, func(r *nftables.Rule) bool {
		m := marked(r.Exprs)
		return m.packet&uint32(egress.MarkMask) != 0 || m.ones&uint32(egress.IDBit) != 0 && first(r.Table)
	})...), nil
}

// comesFirst returns whether a table sees what comes in before its route is looked up. The rules of one have jumps, and
// maps of jumps, so all its chains count.
func comesFirst(chains []chain) func(t *nftables.Table) bool {
	return func(t *nftables.Table) bool {
		return slices.Contains(ofIP, t.Family) && slices.ContainsFunc(chains, func(c chain) bool {
			return c.Table.Family == t.Family && c.Table.Name == t.Name && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookPrerouting
		})
	}
}

// ofIP are the families of tables that see IP packets on their way through the node.
var ofIP = []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}

// connMarksOfOthers returns who writes connection marks: Egret's are of all 32 bits.
func connMarksOfOthers(chains []chain) []string {
	return chainsThat(chains, func(r *nftables.Rule) bool {
		return marked(r.Exprs).conn != 0
	})
}

// chainsThat names the chains that have such a rule.
func chainsThat(chains []chain, have func(*nftables.Rule) bool) (out []string) {
	for _, c := range chains {
		if slices.ContainsFunc(c.rules, have) {
			out = append(out, "chain "+nameOf(c.Chain))
		}
	}
	return out
}

// dropsForwarded names the chains that drop or reject what they do not know of what the node forwards, by policy or by
// their last rule, in tables without a rule for Egret's links.
func dropsForwarded(chains []chain) (out []string) {
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || !slices.Contains(ofIP, c.Table.Family) ||
			(c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop) && !dropsRest(c.rules) {
			continue
		}
		if !slices.ContainsFunc(chains, func(o chain) bool {
			return o.Table.Family == c.Table.Family && o.Table.Name == c.Table.Name && slices.ContainsFunc(o.rules, namesOurLinks)
		}) {
			out = append(out, "chain "+nameOf(c.Chain))
		}
	}
	slices.Sort(out)
	return out
}

// dropsRest reports whether the last rule of a chain drops or rejects whatever has come to it, as firewalld's does.
func dropsRest(rules []*nftables.Rule) bool {
	if len(rules) == 0 {
		return false
	}
	for _, e := range rules[len(rules)-1].Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		case *expr.Target:
			return e.Name == "REJECT"
		default:
			return false // a condition
		}
	}
	return false
}

// namesOurLinks reports whether a rule compares a link's name with those of Egret's.
func namesOurLinks(r *nftables.Rule) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		c, ok := e.(*expr.Cmp)
		return ok && bytes.HasPrefix(c.Data, []byte("egret.v"))
	})
}

func nameOf(c *nftables.Chain) string {
	family := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyNetdev: "netdev",
	}[c.Table.Family]
	return family + " " + c.Table.Name + " " + c.Name
}

// marks are what a rule writes.
type marks struct {
	packet, conn uint32 // the bits of the packet mark, and of the connection mark
	ones         uint32 // of packet, those that may be 1 then
}

// register is what a register holds, as seen from the two marks.
type register struct {
	notPacket, notConn uint32 // the bits that are not those of the mark
	ones               uint32 // the bits that may be 1 and are not those of the packet mark
}

// marked returns what a rule writes.
func marked(exprs []expr.Any) (m marks) {
	const all = 0xffffffff
	registers := map[uint32]register{}
	var last uint32 // the register that was written last
	write := func(n uint32, r register) { last, registers[n] = n, r }
	other := register{all, all, all} // what comes from elsewhere
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			r := registers[e.Register]
			switch {
			case !e.SourceRegister && e.Key == expr.MetaKeyMARK:
				write(e.Register, register{notConn: all})
			case !e.SourceRegister:
				write(e.Register, other)
			case e.Key == expr.MetaKeyMARK:
				m.packet, m.ones = m.packet|r.notPacket, m.ones|r.ones
			}
		case *expr.Ct:
			switch {
			case e.Register != 0 && e.Key == expr.CtKeyMARK:
				write(e.Register, register{all, 0, all})
			case e.Register != 0:
				write(e.Register, other)
			case e.Key == expr.CtKeyMARK: // a write, of which the library does not say from which register
				m.conn |= registers[last].notConn
			}
		case *expr.Bitwise:
			if len(e.Mask) == 4 && len(e.Xor) == 4 {
				keep, flip, r := binary.NativeEndian.Uint32(e.Mask), binary.NativeEndian.Uint32(e.Xor), registers[e.SourceRegister]
				write(e.DestRegister, register{r.notPacket | ^keep | flip, r.notConn | ^keep | flip, r.ones&keep | flip})
			}
		case *expr.Immediate:
			r := other
			if len(e.Data) == 4 {
				r.ones = binary.NativeEndian.Uint32(e.Data)
			}
			write(e.Register, r)
		case *expr.Payload:
			if e.OperationType == expr.PayloadLoad {
				write(e.DestRegister, other)
			}
		case *expr.Lookup:
			if e.IsDestRegSet {
				write(e.DestRegister, other)
			}
		case *expr.Numgen:
			write(e.Register, other)
		case *expr.Hash:
			write(e.DestRegister, other)
		case *expr.Target:
			t := targetMarks(e)
			m = marks{m.packet | t.packet, m.conn | t.conn, m.ones | t.ones}
		}
	}
	return m
}

// targetMarks returns what marked does, of a target of iptables-nft. Revision 2 of MARK has a mark and a mask
// (xt_mark_tginfo2); CONNMARK has both, a mask of the packet mark, and the mode, which says whether it writes the
// connection mark, or restores the packet mark from it (xt_connmark_tginfo1 and 2).
func targetMarks(t *expr.Target) marks {
	info, ok := t.Info.(*xt.Unknown)
	if !ok || len(*info) < 8 {
		return marks{}
	}
	word := func(i int) uint32 { return binary.NativeEndian.Uint32((*info)[4*i:]) }
	const restore = 2 // XT_CONNMARK_RESTORE
	mode := map[uint32]int{1: 12, 2: 14}[t.Rev]
	switch {
	case t.Name == "MARK":
		return marks{packet: word(0) | word(1), ones: word(0)}
	case t.Name != "CONNMARK" || mode == 0 || len(*info) <= mode:
		return marks{}
	case (*info)[mode] == restore:
		return marks{packet: word(2), ones: word(2)}
	}
	return marks{conn: word(0) | word(1)}
}
