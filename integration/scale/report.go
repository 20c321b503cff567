package scale

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// row is one of Rows.
type row int

// What is measured, in the order of the table.
const (
	syncEmpty row = iota
	syncAgain
	fleetJoin
	agentReady
	leasesLost
	unanswered
	restReads
	restWrites
	restRenewals
	restEvents
	restEtcdMB
	restEtcdCPU
	restCrdsyncMB
	restCrdsyncCPU
	restAgentMB
	restAgentCPU
	restFleetCPU
	busyPods
	busyReads
	busyWrites
	busyEvents
	busySeen
	busyEtcdMB
	busyEtcdCPU
	busyCrdsyncMB
	busyCrdsyncCPU
	crdsyncMost
	busyAgentMB
	busyAgentCPU
	busyFleetCPU
	kernelP50
	kernelP99
	wholeP50
	wholeP99
	kernelMissed
	revoked
	firstTaken
	lastTaken
	allTaken
	takenIPs
	takeSeen
	takeEtcdCPU
	takeAgentCPU
	takeFleetCPU
	rolled
	rolloutFailed
	rolloutTook
	rolloutRate
	rolloutList
	rolloutSeen
	rolloutEtcdMB
	rolloutEtcdCPU
	rolloutCrdsyncMB
	rolloutAgentMB
	rolloutAgentCPU
	rolloutFleetCPU
	rows
)

// Row is something that is measured.
type Row struct {
	Name, Unit string
	Goal       float64 // what it may be at most; 0: anything
}

// Rows are what is measured, in the order of a Result's Values.
var Rows = [rows]Row{
	syncEmpty:        {"crdsync: start beside an empty etcd until all is there", "s", 0},
	syncAgain:        {"crdsync: start until a pod's event that it missed is there", "s", 0},
	fleetJoin:        {"agents: all others join", "s", 0},
	agentReady:       {"agent: start until its kernel is programmed", "s", 0},
	leasesLost:       {"agents that lost their lease until the end of the rest", "", 0},
	unanswered:       {"questions without an answer in time until then", "", 0},
	restReads:        {"at rest: etcd reads", "1/s", 1000},
	restWrites:       {"at rest: etcd writes", "1/s", 0},
	restRenewals:     {"at rest: etcd renewals of leases", "1/s", 0},
	restEvents:       {"at rest: etcd watch events", "1/s", 0},
	restEtcdMB:       {"at rest: etcd memory", "MB", 0},
	restEtcdCPU:      {"at rest: etcd CPU", "% of a core", 0},
	restCrdsyncMB:    {"at rest: crdsync memory", "MB", 500},
	restCrdsyncCPU:   {"at rest: crdsync CPU", "% of a core", 0},
	restAgentMB:      {"at rest: agent memory", "MB", 60},
	restAgentCPU:     {"at rest: agent CPU", "% of a core", 1},
	restFleetCPU:     {"at rest: CPU of all other agents", "% of a core", 0},
	busyPods:         {"pod events", "1/s", 0},
	busyReads:        {"pod events: etcd reads", "1/s", 0},
	busyWrites:       {"pod events: etcd writes", "1/s", 0},
	busyEvents:       {"pod events: etcd watch events", "1/s", 0},
	busySeen:         {"pod events: watch events that the other agents got", "1/s", 0},
	busyEtcdMB:       {"pod events: etcd memory", "MB", 0},
	busyEtcdCPU:      {"pod events: etcd CPU", "% of a core", 0},
	busyCrdsyncMB:    {"pod events: crdsync memory", "MB", 500},
	busyCrdsyncCPU:   {"pod events: crdsync CPU", "% of a core", 0},
	crdsyncMost:      {"crdsync memory at its highest since its second start", "MB", 0},
	busyAgentMB:      {"pod events: agent memory", "MB", 60},
	busyAgentCPU:     {"pod events: agent CPU", "% of a core", 0},
	busyFleetCPU:     {"pod events: CPU of all other agents", "% of a core", 0},
	kernelP50:        {"pod to kernel, from the API server's answer, p50", "ms", 0},
	kernelP99:        {"pod to kernel, from the API server's answer, p99", "ms", 100},
	wholeP50:         {"pod to kernel, from the request, p50", "ms", 0},
	wholeP99:         {"pod to kernel, from the request, p99", "ms", 0},
	kernelMissed:     {"pods of which the kernel had nothing after 2 s", "", 0},
	revoked:          {"power-off: until the lease is revoked", "s", 0},
	firstTaken:       {"power-off: until the first IP has a permit", "s", 1.5},
	lastTaken:        {"power-off: until the last IP has a permit", "s", 0},
	allTaken:         {"power-off: from the first IP to the last", "s", 0.5},
	takenIPs:         {"power-off: IPs that were taken over", "", 0},
	takeSeen:         {"power-off: watch events that the others got", "", 0},
	takeEtcdCPU:      {"power-off: etcd CPU until then", "% of a core", 0},
	takeAgentCPU:     {"power-off: agent CPU until then", "% of a core", 0},
	takeFleetCPU:     {"power-off: CPU of all other agents until then", "% of a core", 0},
	rolled:           {"rollout: agents restarted", "", 0},
	rolloutFailed:    {"rollout: agents that were not restarted, by a fault", "", 0},
	rolloutTook:      {"rollout: in", "s", 0},
	rolloutRate:      {"rollout: agents", "1/s", 0},
	rolloutList:      {"rollout: what an agent reads at its start", "MB", 0},
	rolloutSeen:      {"rollout: watch events that the others got for each", "", 0},
	rolloutEtcdMB:    {"rollout: etcd memory", "MB", 0},
	rolloutEtcdCPU:   {"rollout: etcd CPU", "% of a core", 0},
	rolloutCrdsyncMB: {"rollout: crdsync memory", "MB", 500},
	rolloutAgentMB:   {"rollout: agent memory", "MB", 60},
	rolloutAgentCPU:  {"rollout: agent CPU", "% of a core", 0},
	rolloutFleetCPU:  {"rollout: CPU of all other agents", "% of a core", 0},
}

// Result is what was measured in one cluster.
type Result struct {
	Cluster  Cluster
	Values   [rows]float64
	Measured [rows]bool
}

func (r *Result) add(w row, v float64) { r.Values[w], r.Measured[w] = v, true }

// Missed returns the names of the rows above their goals.
func (r Result) Missed() (names []string) {
	for i, w := range Rows {
		if w.Goal > 0 && r.Measured[i] && r.Values[i] > w.Goal {
			names = append(names, w.Name)
		}
	}
	return names
}

// WriteTable writes what was measured of each cluster, and the ratio of the last one to the first.
func WriteTable(w io.Writer, results ...Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name string, of func(Result) string) {
		fmt.Fprint(t, name)
		for _, r := range results {
			fmt.Fprint(t, "\t", of(r))
		}
	}
	for _, size := range []struct {
		name string
		of   func(Cluster) int
	}{
		{"nodes", func(c Cluster) int { return c.Nodes }}, {"gateways", func(c Cluster) int { return c.Gateways }},
		{"egresses", func(c Cluster) int { return c.Egresses }}, {"pods", func(c Cluster) int { return c.Pods }},
	} {
		line(size.name, func(r Result) string { return fmt.Sprint(size.of(r.Cluster)) })
		fmt.Fprintln(t, "\t\t\t")
	}
	for i, row := range Rows {
		if !slices.ContainsFunc(results, func(r Result) bool { return r.Measured[i] }) {
			continue
		}
		line(row.Name, func(r Result) string {
			if !r.Measured[i] {
				return "-"
			}
			return number(r.Values[i])
		})
		fmt.Fprintf(t, "\t%s\t%s\t%s\n", row.Unit, ratio(results, i), goal(results, i))
	}
	return t.Flush()
}

func number(v float64) string {
	switch {
	case v >= 100 || v == float64(int(v)):
		return fmt.Sprintf("%.0f", v)
	case v >= 1:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// ratio is that of the last result to the first.
func ratio(results []Result, i int) string {
	if n := len(results); n > 1 && results[0].Values[i] > 0 && results[n-1].Measured[i] {
		return fmt.Sprintf("x%.1f", results[n-1].Values[i]/results[0].Values[i])
	}
	return ""
}

func goal(results []Result, i int) string {
	if Rows[i].Goal == 0 || len(results) == 0 || !results[len(results)-1].Measured[i] {
		return ""
	}
	verdict := "met"
	if results[len(results)-1].Values[i] > Rows[i].Goal {
		verdict = "missed"
	}
	return fmt.Sprintf("goal %g: %s", Rows[i].Goal, verdict)
}

// WriteCSV writes a header, and a line for each row and cluster: nodes, gateways, egresses, pods, what, unit, value,
// goal. What was not measured is left out, and so is a goal that there is none of.
func WriteCSV(w io.Writer, results ...Result) error {
	text := []byte("nodes,gateways,egresses,pods,what,unit,value,goal\n")
	for _, r := range results {
		for i, row := range Rows {
			if !r.Measured[i] {
				continue
			}
			c, goal := r.Cluster, ""
			if row.Goal > 0 {
				goal = fmt.Sprintf("%g", row.Goal)
			}
			text = fmt.Appendf(text, "%d,%d,%d,%d,%q,%s,%.3f,%s\n", c.Nodes, c.Gateways, c.Egresses, c.Pods, row.Name, row.Unit, r.Values[i], goal)
		}
	}
	_, err := w.Write(text)
	return err
}
