package ownership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mutation is a deliberate fault: a line of the machine that is not what it has to be.
type mutation struct {
	name string
	file string // from the root of the module
	from string // occurs once
	to   string
	args []string // of the search, where the usual schedules are rarely about it, or another test finds the fault
	seed uint64   // of a schedule that finds it; 0: that other test does
}

var (
	restored   = []string{"-schedules-restores", "-schedules-focus=restore"}
	different  = []string{"-schedules-mixed"}
	lost       = []string{"-schedules-focus=loss"}
	suspected  = []string{"-schedules-focus=suspicion"}
	joins      = []string{"-test.run=TestWhoJoins"}
	relabeled  = []string{"-schedules-labels"}
	heldBefore = []string{"-test.run=TestAFormerGateway"}
	lateClaim  = []string{"-test.run=TestALateClaim"}
	unknownP   = []string{"-test.run=TestAPermitIsNoLonger"}
)

var mutations = []mutation{
	{"a claimer does not wait", "ownership/tenure.go", "usable := later(since.Add(longest), bound)", "usable := bound", nil, 250},
	{"a claimer waits for its own P", "ownership/tenure.go", "longest := max(m.cfg.Permit, p.cluster.Longest)", "longest := m.cfg.Permit", different, 95},
	{"who begins uses what it claims before others hear of it", "ownership/tenure.go", "joined.Add(joinGrace+longest)", "joined", joins, 0},
	{"who joins again uses what it claims before others hear of it", "ownership/tenure.go", "FormatLease(p.lease) {\n\t\tt.joined = time.Time{}\n", "FormatLease(p.lease) {\n", joins, 0},
	{"a hand-over counts in an etcd that was restored", "ownership/tenure.go", `o.From != "" && !first`, `o.From != "" && (!first || true)`, restored, 491},
	{"a view of some locks counts as one of all", "ownership/tenure.go", "t.seen = t.seen || !p.cluster.Partial", "t.seen = true", heldBefore, 0},
	{"what was in use before a restore goes on", "ownership/tenure.go", "if !is.over() {\n\t\t\t\tdelete(t.locks, k)\n", "if !is.over() {\n", restored, 829},
	{"what was given back is used by an older snapshot", "ownership/tenure.go",
		"if is.released {\n\t\t\tcontinue", "if is.released && false {\n\t\t\tcontinue", relabeled, 1317},
	{"a longer P is used before claimers know of it", "ownership/machine.go", "m.permits.length.p = 0\n", "m.permits.length.p = m.cfg.Permit\n", unknownP, 0},
	{"all permits are extended when the agent stops", "ownership/machine.go", "return p.Answer && !(now.Before(m.permits.looked) && slices.Contains(e.IPs, p.IP))", "return false", restored, 1183},
	{"a promise is forgotten", "ownership/promise.go", "p.until = later(p.until, now.Add(max(p.length, m.Permit)))", "", lost, 4475},
	{"the promise of one is that of all", "ownership/promise.go", "			oldest = p.answered[peer]\n		}", "			oldest = p.answered[peer]\n		} else {\n			return now\n		}", lost, 20},
	{"promises count while etcd is another one", "ownership/promise.go", " || p.void {", " {", restored, 15},
	{"a promise begins what has ended", "ownership/permit.go", "if now.Before(p.limit.Add(-length / 10)) {", "if true {", lost, 450},
	{"a bound of one and a half P", "ownership/permit.go", "limit = later(since.Add(length), p.limit)", "limit = later(since.Add(length*3/2), p.limit)", nil, 1},
	{"permits without gossip last P longer than the lease", "ownership/permit.go", "return m.lease.Valid.Add(m.cfg.Permit), m.cfg.Permit, nil", "return m.lease.Valid.Add(m.cfg.Permit), 0, nil", nil, 9335},
	{"what the kernel refused to end is forgotten", "ownership/permit.go", "return p.gone, p.silent", "gone, silent = p.gone, p.silent\n	p.gone, p.silent = nil, nil\n	return gone, silent", nil, 595},
	{"a confirmation counts from when it came", "ownership/machine.go", "		m.confirmed(e)\n", "		e.Sent = now\n		m.confirmed(e)\n", nil, 982},
	{"a renewal counts as a confirmation", "ownership/lease.go", "		l.TTL, l.Valid =", "		l.Confirmed = later(l.Confirmed, e.Sent)\n		l.TTL, l.Valid =", nil, 3364},
	{"the answer of a restored etcd is a confirmation", "ownership/lease.go", "if e.Restores != m.restores {", "if false {", restored, 3},
	{"leases of agents that do not bound their permits are revoked", "plan/revocations.go", "!gone && (!dead(name) || !a.Suspectable) || !holds[name] || !a.Revocable || a.Restarting", "!gone && !dead(name) || !holds[name]", nil, 249},
	{"the wait for a suspected owner began before the suspicion", "ownership/peer.go", "suspicion{revision: r.Revision, since: now.now}", "suspicion{revision: r.Revision, since: now.now.Add(-joinGrace / 8)}", suspected, 30},
	{"a node sees less of the owners while a claim of it is on its way", "ownership/sight.go", "due := s.active.Add(m.cfg.Late)", "due := s.active", lateClaim, 0},
	{"a node sees less of the owners although it holds what a restored etcd says", "ownership/sight.go", "!s.whole || s.restores != p.cluster.Restores", "!s.whole", heldBefore, 0},
	{"a node that its pool selects sees no more of the owners than before", "plan/bystander.go", "if Gateway(s, f.Node) {", "if false {", relabeled, 1},
	{"a suspected agent gets a yes", "ownership/loops_test.go", "if ok && there && suspected {", "if ok && there && suspected && false {", suspected, 21},
}

// TestMutations: each deliberate fault is found by the schedule that is noted for it, or where the machine has changed
// since, by another one.
func TestMutations(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			m.run(t, root)
		})
	}
}

func (m mutation) run(t *testing.T, root string) {
	path := filepath.Join(root, m.file)
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(source), m.from); n != 1 {
		t.Fatalf("%s has %d times %q: want 1", m.file, n, m.from)
	}
	dir := t.TempDir()
	mutant, overlay, binary := filepath.Join(dir, "mutant.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "mutant.test")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {path: mutant}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{mutant: strings.Replace(string(source), m.from, m.to, 1), overlay: string(replace)} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-vet=off", "-ldflags=-s -w", "-overlay", overlay, "-o", binary, "./ownership")
	// as `make test-schedules`, whose packages it shares
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	find := func(schedules int, from uint64) (bool, string) {
		args := []string{"-test.run=TestSchedules$", fmt.Sprint("-schedules=", schedules), fmt.Sprint("-schedules-from=", from), "-schedules-first"}
		run := exec.CommandContext(ctx, binary, append(args, m.args...)...)
		run.Env = append(os.Environ(), "GOGC=800")
		out, err := run.CombinedOutput()
		var failed *exec.ExitError
		return errors.As(err, &failed) && strings.Contains(string(out), "--- FAIL"), string(out)
	}
	if found, _ := find(1, m.seed); found {
		return
	}
	const schedules = 20000
	found, out := find(schedules, 1)
	if !found {
		t.Fatalf("%d schedules do not find the fault:\n%s", schedules, out)
	}
	first, _, _ := strings.Cut(out, "\n")
	t.Logf("found by another schedule than the one that is noted (%d): %s", m.seed, first)
}
