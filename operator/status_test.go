package operator

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// A zone that is drained has hundreds of cordons, and a gateway as many moves.
func TestStatusIsAScreenWithManyMovesAndCordons(t *testing.T) {
	w := whole()
	w.Moves, w.Cordons = map[netip.Addr]egress.Move{}, map[string]egress.Cordon{}
	at := ip
	for i := range 300 {
		node := fmt.Sprintf("node-%d", i+100)
		w.Moves[at] = egress.Move{IP: at, To: node, Since: time.Now()}
		w.Cordons[node] = egress.Cordon{Node: node, Since: time.Now()}
		at = at.Next()
	}
	var text, all bytes.Buffer
	if err := status(w, store.Space{}, time.Now(), "", &text); err != nil {
		t.Error(err)
	}
	if err := status(w, store.Space{}, time.Now(), "json", &all); err != nil {
		t.Error(err)
	}
	lines := strings.Count(text.String(), "\n")
	for _, want := range []string{"and 295 more (egret get moves)", "and 295 more (egret get cordons)", "10.10.0.11 to node-100"} {
		if lines > 24 || !strings.Contains(text.String(), want) {
			t.Errorf("%d lines; want %q in\n%s", lines, want, text.String())
		}
	}
	if n := strings.Count(all.String(), `"node-399"`); n != 2 {
		t.Errorf("the last of 300 is in JSON %d times, want a move and a cordon", n)
	}
}
