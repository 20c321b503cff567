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
	premise int // of the package's doc, which it leaves out; 0: none of them
	name    string
	file    string // from the root of the module
	from    string // occurs once
	to      string
	args    []string // of the search, where the usual schedules are rarely about it, or another test finds the fault
	seed    uint64   // of a schedule that finds it, and passes without it; 0: that other test does
}

var (
	restored   = []string{"-schedules-restores", "-schedules-focus=restore"}
	different  = []string{"-schedules-mixed"}
	olderLost  = []string{"-schedules-versions", "-schedules-focus=loss"}
	lost       = []string{"-schedules-focus=loss"}
	suspected  = []string{"-schedules-focus=suspicion"}
	joins      = []string{"-test.run=TestWhoJoins"}
	unheard    = []string{"-test.run=TestWhoWasSeenWithoutGossip"}
	relabeled  = []string{"-schedules-labels"}
	heldBefore = []string{"-test.run=TestAFormerGateway"}
	lateClaim  = []string{"-test.run=TestALateClaim"}
	unknownP   = []string{"-test.run=TestAPermitIsNoLonger"}
	silently   = []string{"-schedules-without-gossip"}
	renewed    = []string{"-schedules-focus=renewal"}

	formerProcess = []string{"-test.run=TestAnswersToAFormerProcess"}
)

// premiseTests are about premises that no mutation leaves out: others cover for them in the schedules, or they are about
// what an agent asks for, and nothing unsafe comes of it.
var premiseTests = map[int]string{
	3:  "agent.TestPermitsLiveByTheLeaseTheyWereGrantedUnder",
	8:  "store.TestAHandOverOfAFormerProcessDoesNothingToLocksThatAreRenumbered",
	17: "TestWhoBeginsIsBoundByWhatItsFormerProcessMayHavePromised",
	19: "TestWhoHoldsNothingAsksEtcdOnlyForItsPeers",
	20: "TestWhoComesToHoldAnIPAsksEtcdFirst",
}

var mutations = []mutation{
	{6, "a claimer does not wait", "ownership/tenure.go", "usable := later(since.Add(longest), bound)", "usable := bound", nil, 69},
	{11, "a claimer waits for its own P", "ownership/tenure.go", "longest := max(m.cfg.Permit, p.cluster.Longest)", "longest := m.cfg.Permit", different, 55},
	{15, "who begins uses what it claims before others hear of it", "ownership/tenure.go", "joined.Add(joinGrace+longest)", "joined", joins, 0},
	{15, "who joins again uses what it claims before others hear of it", "ownership/tenure.go", "FormatLease(p.lease) {\n\t\tt.joined = time.Time{}\n", "FormatLease(p.lease) {\n", joins, 0},
	{13, "a hand-over counts in an etcd that was restored", "ownership/tenure.go", `o.From != "" && !first`, `o.From != "" && (!first || true)`, restored, 86},
	{21, "a view of some locks counts as one of all", "ownership/tenure.go", "t.seen = t.seen || !p.cluster.Partial", "t.seen = true", heldBefore, 0},
	{13, "what was known before a restore of etcd goes on", "ownership/tenure.go",
		"t.adopted, m.claims = nil, claims{}\n\t\tfor k, is := range t.locks {", "for k, is := range (map[lock]tenure{}) {", restored, 3943},
	{7, "what was given back is used by an older snapshot", "ownership/tenure.go",
		"if is.released {\n\t\t\tcontinue", "if is.released && false {\n\t\t\tcontinue", relabeled, 1115},
	{7, "an agent that stops says who was silent before it had a lock", "ownership/etcd_test.go", "egress.Tenure{IP: ip, Why: egress.ReasonRelease}, rev}", "egress.Tenure{IP: ip, Why: egress.ReasonRelease, From: e.owners[ip].From}, rev}", nil, 1796117035703978940},
	{10, "a longer P is used before claimers know of it", "ownership/machine.go", "m.permits.length.p = 0\n", "m.permits.length.p = m.cfg.Permit\n", unknownP, 0},
	{0, "all permits are extended when the agent stops", "ownership/machine.go", "return p.Answer && !(now.Before(m.permits.looked) && slices.Contains(e.IPs, p.IP))", "return false", restored, 99},
	{14, "a promise is forgotten", "ownership/promise.go", "p.until = later(p.until, now.Add(max(p.length, m.Permit)))", "", olderLost, 10578},
	{14, "who has lost its lease gets promises", "ownership/promise.go", "if p.ended(e.From, m) {", "if false {", nil, 1796115553400338811},
	{15, "the promise of one is that of all", "ownership/promise.go", "			oldest = p.answered[peer]\n		}", "			oldest = p.answered[peer]\n		} else {\n			return now\n		}", lost, 11},
	{15, "who has no gossip is forgotten with its record", "ownership/promise.go", "p.deaf[name] = true", "", unheard, 0},
	{16, "a promise begins what has ended", "ownership/permit.go", "if now.Before(p.limit.Add(-length / 10)) {", "if true {", olderLost, 21826},
	{4, "a bound of one and a half P", "ownership/permit.go", "limit = later(since.Add(length), p.limit)", "limit = later(since.Add(length*3/2), p.limit)", nil, 2},
	{4, "permits without gossip last P longer than the lease", "ownership/permit.go", "return m.lease.Valid.Add(m.cfg.Permit), m.cfg.Permit, nil", "return m.lease.Valid.Add(m.cfg.Permit), 0, nil", silently, 1284},
	{5, "what the kernel refused to end is forgotten", "ownership/permit.go", "return p.gone, p.silent", "gone, silent = p.gone, p.silent\n	p.gone, p.silent = nil, nil\n	return gone, silent", nil, 296},
	{1, "a confirmation counts from when it came", "ownership/machine.go", "		m.confirmed(e)\n", "		e.Sent = now\n		m.confirmed(e)\n", nil, 245},
	{2, "a renewal counts as a confirmation", "ownership/lease.go", "		l.TTL, l.Valid =", "		l.Confirmed = later(l.Confirmed, e.Sent)\n		l.TTL, l.Valid =", renewed, 148},
	{12, "the answer of a restored etcd is a confirmation", "ownership/lease.go", "if e.Restores != m.restores {", "if false {", restored, 1291},
	{9, "leases of agents that do not bound their permits are revoked", "plan/revocations.go", "!gone && (!dead(name) || !a.Suspectable) || !holds[name] || !a.Revocable || a.Restarting", "!gone && !dead(name) || !holds[name]", nil, 433},
	{6, "the wait for a suspected owner began before the suspicion", "ownership/peer.go", "suspicion{revision: r.Revision, since: now.now}", "suspicion{revision: r.Revision, since: now.now.Add(-joinGrace / 8)}", suspected, 6},
	{22, "a node sees less of the owners while a claim of it is on its way", "ownership/sight.go", "due := s.active.Add(m.cfg.Late)", "due := s.active", lateClaim, 0},
	{22, "a node sees less of the owners although it holds what a restored etcd says", "ownership/sight.go", "!s.whole || s.restores != p.cluster.Restores", "!s.whole", heldBefore, 0},
	{21, "a node that its pool selects sees no more of the owners than before", "plan/bystander.go", "if Gateway(s, f.Node) {", "if false {", relabeled, 3},
	{18, "an answer to a former process counts", "ownership/promise.go", "if m.Process == p.process {", "if true {", formerProcess, 0},
	{6, "a suspected agent gets a yes", "ownership/loops_test.go", "if ok && there && suspected && !n.old {", "if ok && there && suspected && false {", suspected, 39},
}

// TestMutations: each deliberate fault is found by the schedule that is noted for it, or where the machine has changed
// since, by another one. Without the fault that one passes.
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
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	fails := func(binary string, schedules int, from uint64) (bool, string) {
		args := []string{"-test.run=TestSchedules$", fmt.Sprint("-schedules=", schedules), fmt.Sprint("-schedules-from=", from), "-schedules-first"}
		run := exec.CommandContext(ctx, binary, append(args, m.args...)...)
		run.Env = append(os.Environ(), "GOGC=800")
		out, err := run.CombinedOutput()
		var failed *exec.ExitError
		return errors.As(err, &failed) && strings.Contains(string(out), "--- FAIL"), string(out)
	}
	passes := func(from uint64) {
		if m.seed == 0 {
			return // it is a test of its own
		}
		if failed, out := fails(self, 1, from); failed {
			t.Errorf("schedule %d fails without the fault, too:\n%s", from, out)
		}
	}
	if found, _ := fails(binary, 1, m.seed); found {
		passes(m.seed)
		return
	}
	const schedules = 20000
	found, out := fails(binary, schedules, 1)
	if !found {
		t.Fatalf("%d schedules do not find the fault:\n%s", schedules, out)
	}
	first, _, _ := strings.Cut(out, "\n")
	t.Logf("found by another schedule than the one that is noted (%d): %s", m.seed, first)
	var seed uint64
	if _, err := fmt.Sscanf(first, "seed %d:", &seed); err != nil {
		t.Fatalf("no seed in %q: %v", first, err)
	}
	passes(seed)
}
