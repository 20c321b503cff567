package nft

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/egret-project/egret/egress"
)

// listed returns how to list a set of so many elements in a network namespace of the test's own, and how many came.
func listed(t *testing.T, thousands int) (tables *Tables, list func() (int, error)) {
	t.Helper()
	s := State{Hosted: map[egress.ID]Hosted{}, OverlayMTU: 1450}
	for i := range thousands {
		id, ip := egress.ID(i+1), addrAt("10.10.0.0", i+1)
		s.Hosted[id] = Hosted{IP: ip, Mark: egress.LocalMark}
		for n := range 1000 {
			s.Senders = append(s.Senders, Sender{Node: addrAt("10.0.0.0", n+2), Source: egress.OverlaySource(n+2, id, ip), ID: id})
		}
	}
	tables = open(t)
	reach(t, tables, s)
	return tables, func() (int, error) {
		all, err := tables.dumpSet(table{family: nftables.TableFamilyINet, name: egress.TableName}, "sender4")
		return len(all), err
	}
}

// A gateway of many nodes on a slow machine takes longer for a listing than the kernel may take for a message of it.
func TestAListingMayTakeLongerThanAMessage(t *testing.T) {
	tables, list := listed(t, 30)
	begin := time.Now()
	want, err := list()
	if err != nil {
		t.Fatal(err)
	}
	tables.read.timeout = time.Since(begin) / 8
	var took time.Duration
	for range 10 { // on a busy machine a message may be late
		begin = time.Now()
		n, err := list()
		if took = time.Since(begin); err != nil {
			t.Logf("%v for each message: %v", tables.read.timeout, err)
			continue
		}
		t.Logf("%d elements in %v, with %v for each message", n, took, tables.read.timeout)
		if n != want {
			t.Errorf("%d elements, want %d", n, want)
		}
		if took > tables.read.timeout {
			return
		}
	}
	t.Error("no listing took longer than a message may, and was had")
}

// What is left of an answer that was not waited for is not taken for the answer to the next question.
func TestTheRestOfAListingAnswersNoOtherQuestion(t *testing.T) {
	tables, list := listed(t, 30)
	want, err := list()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		tables.read.timeout = time.Nanosecond
		if n, err := list(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("without time for an answer: %d elements, %v", n, err)
		}
		tables.read.timeout = 0
		if _, err := tables.read.generation(); err != nil {
			t.Error(err)
		}
		if n, err := list(); err != nil || n != want {
			t.Errorf("%d elements, %v; want %d", n, err, want)
		}
	}
}
