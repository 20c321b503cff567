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
// rules also those of an id, which is the mark of a packet between nodes while the kernel looks for its way.
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
	return append(out, chainsThat(chains, func(r *nftables.Rule) bool {
		packet, _ := marked(r.Exprs)
		return packet&uint32(egress.MarkMask) != 0
	})...), nil
}

// connMarksOfOthers returns who writes connection marks: Egret's are of all 32 bits.
func connMarksOfOthers(chains []chain) []string {
	return chainsThat(chains, func(r *nftables.Rule) bool {
		_, conn := marked(r.Exprs)
		return conn != 0
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
	forwarding := []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6}
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || !slices.Contains(forwarding, c.Table.Family) ||
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

// marked returns the bits of the packet mark, and of the connection mark, that a rule writes.
func marked(exprs []expr.Any) (packet, conn uint32) {
	const all = 0xffffffff
	// By register: the bits that are not those of the packet mark, and not those of the connection mark.
	notPacket, notConn := map[uint32]uint32{}, map[uint32]uint32{}
	var last uint32 // the register that was written last
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			switch {
			case !e.SourceRegister:
				last, notPacket[e.Register], notConn[e.Register] = e.Register, all, all
				if e.Key == expr.MetaKeyMARK {
					notPacket[e.Register] = 0
				}
			case e.Key == expr.MetaKeyMARK:
				packet |= notPacket[e.Register]
			}
		case *expr.Ct:
			switch {
			case e.Register != 0:
				last, notPacket[e.Register], notConn[e.Register] = e.Register, all, all
				if e.Key == expr.CtKeyMARK {
					notConn[e.Register] = 0
				}
			case e.Key == expr.CtKeyMARK: // a write, of which the library does not say from which register
				conn |= notConn[last]
			}
		case *expr.Bitwise:
			if len(e.Mask) == 4 && len(e.Xor) == 4 {
				changed := ^binary.NativeEndian.Uint32(e.Mask) | binary.NativeEndian.Uint32(e.Xor)
				last, notPacket[e.DestRegister], notConn[e.DestRegister] = e.DestRegister, notPacket[e.SourceRegister]|changed, notConn[e.SourceRegister]|changed
			}
		case *expr.Immediate:
			last, notPacket[e.Register], notConn[e.Register] = e.Register, all, all
		case *expr.Target:
			p, c := targetMarks(e)
			packet, conn = packet|p, conn|c
		}
	}
	return packet, conn
}

// targetMarks returns what marked does, of a target of iptables-nft. Revision 2 of MARK has a mark and a mask
// (xt_mark_tginfo2); CONNMARK has both, a mask of the packet mark, and the mode, which says whether it writes the
// connection mark, or restores the packet mark from it (xt_connmark_tginfo1 and 2).
func targetMarks(t *expr.Target) (packet, conn uint32) {
	info, ok := t.Info.(*xt.Unknown)
	if !ok || len(*info) < 8 {
		return 0, 0
	}
	word := func(i int) uint32 { return binary.NativeEndian.Uint32((*info)[4*i:]) }
	const restore = 2 // XT_CONNMARK_RESTORE
	mode := map[uint32]int{1: 12, 2: 14}[t.Rev]
	switch {
	case t.Name == "MARK":
		return word(0) | word(1), 0
	case t.Name != "CONNMARK" || mode == 0 || len(*info) <= mode:
		return 0, 0
	case (*info)[mode] == restore:
		return word(2), 0
	}
	return 0, word(0) | word(1)
}
