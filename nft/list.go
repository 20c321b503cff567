package nft

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// List writes what the kernel has of our tables, for a person who looks for a fault: chains, rules, counters, and the
// elements of the sets, of each set at most so many. It is close to what `nft list table` prints, and needs no such
// program. A rule is known by its tag: one of another version of Egret, or made with settings that are not among the
// usual ones, is written as its tag. It writes nothing to the kernel. That tables are absent is written, and is no
// error.
func (t *Tables) List(w io.Writer, most int) error {
	out := bufio.NewWriter(w)
	var errs []error
	for _, want := range tables(State{}) {
		var have observedTable
		sets := map[string][]element{}
		err := t.read.whole(func(uint32) (err error) {
			if have, err = t.observe(want); err != nil || !have.exists {
				return err
			}
			for _, s := range want.sets {
				if _, ok := have.sets[s.name]; !ok {
					continue
				}
				if sets[s.name], err = t.dumpSet(want, s.name); err != nil {
					return fmt.Errorf("set %s: %w", s.name, err)
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("reading table %s: %w", want.id(), err))
			continue
		}
		want.list(out, have, sets, knownRules(have.carriers()), most)
	}
	return errors.Join(append(errs, out.Flush())...)
}

// knownRules returns the words of rules by their tags: those of the usual settings of agents. links are those that have
// chains of their own.
func knownRules(links map[string]Carrier) map[string]string {
	const longest = 60 * time.Second // of leases
	renewal := NewRenewal(500*time.Millisecond, longest)
	for lease := 2 * time.Second; lease < longest; lease += time.Second {
		renewal.Lengths = append(renewal.Lengths, NewRenewal(500*time.Millisecond, lease).Lengths...)
	}
	slices.Sort(renewal.Lengths)
	renewal.Lengths = slices.Compact(renewal.Lengths)
	usual := State{FirstPacketDelay: 2 * time.Second, Renewal: renewal, Carriers: links, Peers: map[int]netip.Addr{1: {}}}
	words := map[string]string{}
	for _, s := range []State{{}, usual, {RandomPorts: true}, {OverlayMTU: 1450}, {OverlayMTU: 1430}, {OverlayMTU: 8950}} {
		for _, t := range tables(s) {
			for _, c := range t.chains {
				for _, r := range c.rules {
					words[r.tag] = r.words
				}
			}
		}
	}
	return words
}

// carriers returns the links of which there is a chain, with the MAC addresses that its rules have.
func (o observedTable) carriers() map[string]Carrier {
	out := map[string]Carrier{}
	for _, c := range o.chains {
		if l, err := net.InterfaceByName(c.hook.device); err == nil && len(l.HardwareAddr) == 6 {
			out[c.hook.device] = Carrier{MAC: [6]byte(l.HardwareAddr)}
		}
	}
	return out
}

// list writes one table; an error of w shows when it is flushed.
func (t table) list(w *bufio.Writer, have observedTable, sets map[string][]element, known map[string]string, most int) {
	if !have.exists {
		fmt.Fprintf(w, "table %s: absent\n", t.id())
		return
	}
	fmt.Fprintf(w, "table %s { # flags 0x%x, owned by socket %d\n", t.id(), have.flags, have.socket)
	ours := map[string]set{}
	for _, s := range t.sets {
		ours[s.name] = s
	}
	for _, name := range slices.Sorted(maps.Keys(have.sets)) {
		s, ok := ours[name]
		if !ok {
			fmt.Fprintf(w, "\tset %s # not ours, or of another version\n", name)
			continue
		}
		elements := sets[name]
		fmt.Fprintf(w, "\t%s %s %s # %d elements\n", s.noun(), name, s.definition(), len(elements))
		for i, line := range s.lines(elements) {
			if i == most {
				fmt.Fprintf(w, "\t\t# and %d more\n", len(elements)-i)
				break
			}
			fmt.Fprintf(w, "\t\t%s\n", line)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.objects)) {
		fmt.Fprintf(w, "\t%s %s # %d packets\n", have.objects[name], name, have.packets[name])
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		c := have.chains[name]
		fmt.Fprintf(w, "\tchain %s {", name)
		if c.hook != (observedHook{}) {
			fmt.Fprintf(w, " # type %s, hook %d %q, priority %d, policy %d", c.hook.kind, c.hook.num, c.hook.device, c.hook.prio, c.hook.policy)
		}
		fmt.Fprintln(w)
		for _, tag := range c.tags {
			rule := known[tag]
			if tag == "" {
				rule = "# a rule that is not Egret's"
			}
			fmt.Fprintf(w, "\t\t%s\n", cmp.Or(rule, "# rule "+tag+", made with other settings or by another version"))
		}
		fmt.Fprintln(w, "\t}")
	}
	fmt.Fprintln(w, "}")
}

// lines prints elements in the order of their keys, with what they count and how long they last yet.
func (s set) lines(list []element) []string {
	if s.flags&flagInterval != 0 {
		joined := ranges(list)
		var out []string
		for _, first := range slices.Sorted(maps.Keys(joined)) {
			out = append(out, s.key.print(first)+"-"+s.key.print(joined[first]))
		}
		return out
	}
	type printed struct{ key, line string }
	var all []printed
	for _, e := range list {
		if len(e.key) != int(s.key.Bytes) || e.value != "" && len(e.value) != int(s.value.Bytes) {
			all = append(all, printed{e.key, fmt.Sprintf("# %x, of another type", e.key)})
			continue
		}
		key := s.key.wire(e.key)
		line := s.key.print(key)
		if e.value != "" {
			line += " : " + s.value.print(s.value.wire(e.value))
		}
		if e.object != "" {
			line += " : " + e.object
		}
		if e.left > 0 {
			line += " expires " + e.left.String()
		}
		if e.packets > 0 {
			line += fmt.Sprintf(" counter packets %d bytes %d", e.packets, e.bytes)
		}
		all = append(all, printed{key, line})
	}
	slices.SortFunc(all, func(a, b printed) int { return cmp.Compare(a.key, b.key) })
	out := make([]string, len(all))
	for i, p := range all {
		out[i] = p.line
	}
	return out
}
