package operator

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/client-go/util/jsonpath"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Kinds are what Get can list.
var Kinds = []string{kindActs, "agents", "allocations", KindBlocks, "cordons", "egresses", kindMembers, "moves", "nodes", "owners", "pins", "pools"}

// kindActs is the kind of what people did with these commands.
const kindActs = "acts"

// kindMembers is the kind of the pods of each egress on each node.
const kindMembers = "members"

// wide is the format of a table with further columns, which records alone have.
const wide = "wide"

// Check returns an error that says what is wrong with a kind or a format: those of CheckFormat, and "wide".
func Check(kind, format string) error {
	if !slices.Contains(Kinds, kind) {
		return fmt.Errorf("kind %q: want one of %s", kind, strings.Join(Kinds, ", "))
	}
	if format == wide {
		return nil
	}
	return checkFormat(format, "json, yaml, name, wide, or jsonpath='{...}'")
}

// CheckFormat returns an error that says what is wrong with a format: "json", "yaml", "name", "jsonpath=..." as kubectl
// has it, or "" for a table.
func CheckFormat(format string) error {
	return checkFormat(format, "json, yaml, name, or jsonpath='{...}'")
}

func checkFormat(format, want string) error {
	if template, ok := strings.CutPrefix(format, "jsonpath="); ok {
		_, err := parsePath(template)
		return err
	}
	if !slices.Contains([]string{"", "json", "yaml", "name"}, format) {
		return fmt.Errorf("output format %q: want %s", format, want)
	}
	return nil
}

func parsePath(template string) (*jsonpath.JSONPath, error) {
	p := jsonpath.New("output").AllowMissingKeys(true)
	if err := p.Parse(template); err != nil {
		return nil, fmt.Errorf("output format jsonpath=%s: %w; want one as kubectl has it, like '{.items[*].node}'", template, err)
	}
	return p, nil
}

// Get writes the records of a kind to w, sorted by key; see Check. Records that cannot be read are left out and
// returned as an error, after the others were written.
func Get(ctx context.Context, c *store.Client, kind, format string, w io.Writer) error {
	if err := Check(kind, format); err != nil {
		return err
	}
	if kind == KindBlocks {
		return Blocks(ctx, c, netip.Addr{}, format, w)
	}
	if kind == kindActs {
		acts, faults, err := c.Acts(ctx)
		if err != nil {
			return err
		}
		return errors.Join(listActs(acts).write(format, w), unread(faults))
	}
	all, err := read(ctx, c, kind)
	if err != nil {
		return err
	}
	if err := list(kind, all, time.Now()).write(format, w); err != nil {
		return err
	}
	return unread(slices.DeleteFunc(all.Faults, func(f egress.Fault) bool { return !strings.HasPrefix(f.Key, kind+"/") }))
}

// read reads what a kind is listed from: members, which are as many as there are pods, only where they are asked for.
func read(ctx context.Context, c *store.Client, kind string) (store.Everything, error) {
	if kind == kindMembers {
		whole, err := c.ReadWhole(ctx)
		return whole.Everything, err
	}
	return c.ReadAll(ctx)
}

// unread returns an error that names records that cannot be read; nil: there are none.
func unread(faults []egress.Fault) error {
	var errs []error
	for _, f := range faults {
		errs = append(errs, fmt.Errorf("record %s could not be read: %w", f.Key, f.Err))
	}
	return errors.Join(errs...)
}

// listing is one kind's records, and the same as rows of a table.
type listing struct {
	kind    string // for names
	records []any
	header  string
	rows    [][]string
	// more are the columns that a wide table has besides, for as many rows as there are in it.
	moreHeader string
	more       [][]string
}

func (l listing) write(format string, w io.Writer) error {
	switch format {
	case "json":
		return writeJSON(w, append([]any{}, l.records...)) // none is [], not null
	case "yaml":
		return writeYAML(w, append([]any{}, l.records...))
	case "name":
		for _, row := range l.rows {
			if err := writeName(w, l.kind+"/"+l.name(row)); err != nil {
				return err
			}
		}
		return nil
	}
	if template, ok := strings.CutPrefix(format, "jsonpath="); ok {
		return writePath(w, template, l.list())
	}
	header, rows := l.columns(format)
	return writeTable(w, header, rows)
}

// columns returns the table of a format, which has further columns where that is wide.
func (l listing) columns(format string) (header string, rows [][]string) {
	if format != wide || l.moreHeader == "" {
		return l.header, l.rows
	}
	rows = make([][]string, len(l.rows))
	for i, row := range l.rows {
		if rows[i] = slices.Clone(row); i < len(l.more) {
			rows[i] = append(rows[i], l.more[i]...)
		}
	}
	return l.header + " " + l.moreHeader, rows
}

// name returns what names the record of a row: its first column, of what is below an IP or an egress the second as
// well.
func (l listing) name(row []string) string {
	if l.kind == kindMembers || l.kind == KindBlocks || l.kind == kindActs {
		return row[0] + "/" + row[1]
	}
	return row[0]
}

// list is the records as kubectl prints them.
func (l listing) list() any { return map[string]any{"kind": "List", "items": l.records} }

// writePath writes what a template chooses of a record, or of a list of them.
func writePath(w io.Writer, template string, v any) error {
	p, err := parsePath(template)
	if err != nil {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	plain, err := plainly(b)
	if err != nil {
		return err
	}
	var out strings.Builder
	if err := p.Execute(&out, plain); err != nil {
		return fmt.Errorf("output format jsonpath=%s: %w", template, err)
	}
	_, err = fmt.Fprintln(w, PrintableLines(out.String()))
	return err
}

// writeName writes the name of a record.
func writeName(w io.Writer, name string) error {
	_, err := fmt.Fprintln(w, Printable(name, 2*len(name)))
	return err
}

// plainly returns JSON as maps, lists and values, which have the names that the JSON has; whole numbers stay whole.
func plainly(b []byte) (v any, err error) {
	return v, utiljson.Unmarshal(b, &v)
}

func list(kind string, all store.Everything, now time.Time) listing {
	l := listing{kind: kind}
	add := func(record any, row ...string) {
		l.records = append(l.records, record)
		l.rows = append(l.rows, row)
	}
	more := func(columns ...string) { l.more = append(l.more, columns) }
	switch kind {
	case "agents":
		l.moreHeader = "MAC PERMIT KERNEL"
		l.header = "NODE ADDRESS VERSION AGE LEASE FAULTS"
		for _, name := range slices.Sorted(maps.Keys(all.Agents)) {
			a := all.Agents[name]
			add(a, name, a.Address.String(), dash(a.Version), age(now, a.Since), a.Lease, dash(strings.Join(troubles(a), ",")))
			more(dash(a.MAC), orDash(a.Permit), some(a.Features))
		}
	case kindMembers:
		l.header, l.moreHeader = "EGRESS NODE PODS PORTS", "NAMES"
		for _, name := range slices.Sorted(maps.Keys(all.ByEgress)) {
			for _, node := range slices.Sorted(maps.Keys(all.ByEgress[name])) {
				m := all.ByEgress[name][node]
				ports := 0
				for _, b := range m.Blocks {
					ports += b.Size
				}
				add(m, name, node, strconv.Itoa(len(m.Pods)), strconv.Itoa(ports))
				more(dash(strings.ReplaceAll(podNames(m), ", ", ",")))
			}
		}
	case "moves":
		l.header, l.moreHeader = "IP FROM TO AGE WHY READY", "BY"
		for _, ip := range slices.SortedFunc(maps.Keys(all.Moves), netip.Addr.Compare) {
			m := all.Moves[ip]
			add(m, ip.String(), dash(all.Owners[ip].Node), m.To, age(now, m.Since), string(cmp.Or(m.Why, egress.ReasonMove)), strconv.FormatBool(m.ReadyAt(all.Agents[m.To])))
			more(dash(m.By))
		}
	case "allocations":
		l.header, l.moreHeader = "IP POOL ID EGRESSES AGE", "NODE"
		for _, a := range all.Allocations {
			add(a, a.IP.String(), dash(a.Pool), a.ID.String(), strings.Join(a.Egresses, ","), age(now, a.Since))
			more(dash(all.Owners[a.IP].Node))
		}
	case "owners":
		l.header, l.moreHeader = "IP NODE AGE WHY LEASE REVISION", "FROM EGRESSES"
		egresses := byIP(&all.Snapshot)
		for _, ip := range slices.SortedFunc(maps.Keys(all.Owners), netip.Addr.Compare) {
			o := all.Owners[ip]
			lease := egress.FormatLease(o.Lease)
			add(lock{o, lease, o.Revision}, ip.String(), o.Node, age(now, o.Since), string(o.Why), lease, strconv.FormatInt(o.Revision, 10))
			more(dash(o.From), some(egresses[ip]))
		}
	case "nodes":
		l.header, l.moreHeader = "NODE ADDRESSES INDEX AGENT HOLDS CAPACITY CORDONED", "POD-CIDRS FAULTS"
		for _, name := range slices.Sorted(maps.Keys(all.Nodes)) {
			n := all.Nodes[name]
			add(n, name, join(n.Addresses), strconv.Itoa(n.Index), agentState(all, name, now), strconv.Itoa(holds(all, name)),
				limit(n.Capacity), strconv.FormatBool(plan.Cordoned(&all.Snapshot, name)))
			more(join(n.PodCIDRs), some(troubles(all.Agents[name])))
		}
		for _, name := range slices.Sorted(maps.Keys(all.Agents)) {
			if plan.Gone(&all.Snapshot, name) { // an agent of no node of the cluster
				l.rows = append(l.rows, []string{name, "-", "gone", agentState(all, name, now), strconv.Itoa(holds(all, name)), "-", "-"})
				more("-", some(troubles(all.Agents[name])))
			}
		}
	case "cordons":
		l.header, l.moreHeader = "NODE AGE WHY", "BY"
		for _, name := range slices.Sorted(maps.Keys(all.Cordons)) {
			r := all.Cordons[name]
			add(r, name, age(now, r.Since), dash(r.Why))
			more(dash(r.By))
		}
	case "pins":
		l.header = "IP NODE"
		for _, ip := range slices.SortedFunc(maps.Keys(all.Pins), netip.Addr.Compare) {
			add(all.Pins[ip], ip.String(), all.Pins[ip].Node)
		}
	case "egresses":
		l.header, l.moreHeader = "NAME EGRESSIP POOL NODE AGE", "IDS BANDWIDTH FORMER"
		for _, name := range slices.Sorted(maps.Keys(all.Egresses)) {
			p := all.Egresses[name]
			var ips, pools, nodes, ids, former []string
			for _, a := range p.Addresses {
				ips, pools = append(ips, a.IP.String()), append(pools, dash(a.Pool))
				nodes, ids = append(nodes, dash(all.Owners[a.IP].Node)), append(ids, a.ID.String())
			}
			for _, a := range p.Former {
				former = append(former, a.IP.String())
			}
			bandwidth := "-"
			if b := p.Bandwidth; b != nil {
				bandwidth = strconv.FormatInt(b.Rate, 10) + "bit/s"
			}
			add(p, name, some(ips), some(pools), some(nodes), age(now, p.Created))
			more(some(ids), bandwidth, some(former))
		}
	case "pools":
		l.header, l.moreHeader = "NAME RANGES TOTAL USED", "GATEWAY VLAN NODES"
		for _, name := range slices.Sorted(maps.Keys(all.Pools)) {
			p := all.Pools[name]
			used := 0
			for _, a := range all.Allocations {
				if a.Pool == name {
					used++
				}
			}
			add(p, name, join(p.Ranges), strconv.FormatInt(p.Total(), 10), strconv.Itoa(used))
			gateway, vlan := "-", "-"
			if p.Subnet != nil {
				gateway, vlan = p.Subnet.Gateway.String()+"/"+strconv.Itoa(p.Subnet.PrefixLength), limit(p.Subnet.VLAN)
			}
			more(gateway, vlan, strconv.Itoa(len(selected(&all.Snapshot, p))))
		}
	}
	return l
}

// lock is an owner, and what etcd has of its key.
type lock struct {
	egress.Owner
	Lease    string `json:"lease"`
	Revision int64  `json:"revision"` // the fencing token
}

// byIP returns the names of the egresses that use each IP, sorted.
func byIP(s *egress.Snapshot) map[netip.Addr][]string {
	out := map[netip.Addr][]string{}
	for _, name := range slices.Sorted(maps.Keys(s.Egresses)) {
		for _, a := range s.Egresses[name].Addresses {
			out[a.IP] = append(out[a.IP], name)
		}
	}
	return out
}

// selected returns the nodes that a pool selects, sorted, whether they can hold an IP or not.
func selected(s *egress.Snapshot, p egress.Pool) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(s.Nodes)), func(name string) bool { return !p.NodeSelector.Matches(s.Nodes[name].Labels) })
}

// troubles are the parts of a node that are at fault, and what else its agent says is wrong.
func troubles(a egress.Agent) []string {
	out := slices.Sorted(maps.Keys(a.Faults))
	for what, n := range map[string]int{"address in use": len(a.Conflicts), "drops": len(a.Dropped), "pool refused": len(a.Refused)} {
		if n > 0 {
			out = append(out, what)
		}
	}
	slices.Sort(out)
	if a.Restarting {
		out = append(out, "restarting")
	}
	return out
}

func listActs(acts []egress.Act) listing {
	l := listing{kind: kindActs, header: "TIME WHAT IP NODE BY"}
	for _, a := range acts {
		ip := "-"
		if a.IP.IsValid() {
			ip = a.IP.String()
		}
		l.records = append(l.records, a)
		l.rows = append(l.rows, []string{a.Since.Format(timeFormat), string(a.What), ip, dash(a.Node), a.By})
	}
	return l
}

func agentState(all store.Everything, node string, now time.Time) string {
	a, ok := all.Agents[node]
	if !ok {
		return "down"
	}
	return cmp.Or(a.Version, "up") + " " + age(now, a.Since)
}

func holds(all store.Everything, node string) int {
	n := 0
	for _, o := range all.Owners {
		if o.Node == node {
			n++
		}
	}
	return n
}

func writeJSON(w io.Writer, v any) error {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(escaped(out.Bytes()))
	return err
}

func writeYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		b, err = yaml.JSONToYAML(escaped(b))
	}
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// CheckReport returns an error that says what is wrong with a format of what is no list of records: "json", "yaml", or
// "" for text.
func CheckReport(format string) error {
	if !slices.Contains([]string{"", "json", "yaml"}, format) {
		return fmt.Errorf("output format %q: want json or yaml", format)
	}
	return nil
}

// writeReport writes what is no list of records.
func writeReport(w io.Writer, format string, v any, text func() error) error {
	switch format {
	case "json":
		return writeJSON(w, v)
	case "yaml":
		return writeYAML(w, v)
	}
	return text()
}

// age prints how long ago t was, as kubectl does: the largest unit that fits.
func age(now, t time.Time) string {
	d := now.Sub(t)
	switch {
	case t.IsZero():
		return "-"
	case d < 2*time.Minute:
		return strconv.Itoa(int(max(d, 0).Seconds())) + "s"
	case d < 2*time.Hour:
		return strconv.Itoa(int(d.Minutes())) + "m"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + "h"
	}
	return strconv.Itoa(int(d.Hours()/24)) + "d"
}

// orDash prints a duration that may not be known.
func orDash(d egress.Duration) string {
	if d == 0 {
		return "-"
	}
	return time.Duration(d).String()
}

func dash(s string) string { return cmp.Or(s, "-") }

func some(s []string) string { return dash(strings.Join(s, ",")) }

func limit(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func join[T fmt.Stringer](s []T) string {
	out := make([]string, len(s))
	for i, x := range s {
		out[i] = x.String()
	}
	return some(out)
}
