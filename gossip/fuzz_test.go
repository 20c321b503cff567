package gossip

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/egret-project/egret/ownership"
)

// A member of another version, or one that was broken into, may say anything: nothing falls, only who says so leaves,
// and only a question is answered, to who asked, by a promise for that question.
func FuzzMessage(f *testing.F) {
	for _, message := range []string{
		"", "\x00", "n2\x00", "n2\x00{", "n2", "n1\x00{}", `n2` + "\x00" + `{"process":7,"sent":1000,"permit":2000000000,"silent":true}`,
		`n2` + "\x00" + `{"process":1,"sent":1000,"promise":true}`, `n2` + "\x00" + `{"sent":-9223372036854775808,"permit":9223372036854775807}`,
	} {
		f.Add([]byte(message))
	}
	start := time.Unix(1000, 0)
	f.Fuzz(func(t *testing.T, b []byte) {
		machine := ownership.New(ownership.Config{Node: "n1", Permit: 2 * time.Second, Gossip: true, Freeze: true, Process: 1, Start: start})
		received := 0
		g := New(Config{Node: "n1", Receive: func(from string, message []byte) {
			received++
			if len(message) == 0 || from+"\x00"+string(message) != string(b) {
				t.Errorf("%q is received as %q from %q", b, message, from)
			}
			var m ownership.Message
			if json.Unmarshal(message, &m) != nil {
				return
			}
			for _, e := range machine.Step(start.Add(time.Minute), ownership.Heard{From: from, Message: m}) {
				say, ok := e.(ownership.Say)
				if promise := say.Message; ok && (m.Promise || say.To != from || !promise.Promise || promise.Process != m.Process || promise.Sent != m.Sent) {
					t.Errorf("%+v from %s is answered by %+v", m, from, say)
				}
			}
		}})
		g.known["n3"] = member{state: Alive}
		(*delegate)(g).NotifyMsg(b)
		from, message, ok := strings.Cut(string(b), "\x00")
		if left := ok && message == ""; g.known[from].left != left || received > 0 != (ok && !left) {
			t.Errorf("%q: received %d times, %q has left: %t", b, received, from, g.known[from].left)
		}
		if from != "n3" && g.known["n3"].left || g.State("n3") != Alive {
			t.Errorf("after %q n3 is %+v", b, g.known["n3"])
		}
	})
}

// Whatever a file of keys holds: it has keys that gossip takes, or it is refused.
func FuzzKeys(f *testing.F) {
	for _, text := range []string{"", strings.Repeat("A", 43) + "=\n", "AAAAAAAAAAAAAAAAAAAAAA==\r\n" + strings.Repeat("A", 32), "====", "\u00a0", "AAAA AAAA"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := parseKeys(text)
		if (err == nil) != (len(keys) > 0) {
			t.Errorf("%q: %d keys, %v", text, len(keys), err)
		}
		for _, key := range keys {
			if memberlist.ValidateKey(key) != nil {
				t.Errorf("%q has a key of %d bytes", text, len(key))
			}
		}
	})
}
