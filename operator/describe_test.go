package operator

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

func TestWhoCordonedANodeIsToldWithIt(t *testing.T) {
	now := time.Now()
	for by, want := range map[string]string{"bob@desk": "by bob@desk, with egret, 3h ago", "": "by egret, 3h ago"} {
		w := whole()
		w.Cordons = map[string]egress.Cordon{"node-1": {Node: "node-1", Since: now.Add(-3 * time.Hour), Why: "drain", By: by}}
		rows, err := describe(w, "node", "node-1", nil, now)
		var out bytes.Buffer
		if err == nil {
			err = writeTable(&out, "", rows)
		}
		if err != nil || !strings.Contains(out.String(), want+"\n") {
			t.Errorf("%v; want %q in\n%s", err, want, out.String())
		}
		out.Reset()
		if err := list("cordons", w.Everything, now).write(wide, &out); err != nil || !strings.HasSuffix(out.String(), dash(by)+"\n") {
			t.Errorf("%v; want %q at the end of\n%s", err, dash(by), out.String())
		}
	}
}
