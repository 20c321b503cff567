package operator

import (
	"strings"
	"testing"

	"github.com/egret-project/egret/check"
)

func TestCheckNamesAgentsWhoseNodeIsGone(t *testing.T) {
	s := snapshot()
	if f := agents(check.Finding{Level: check.OK}, *s); f.Level != check.OK || f.Found != "2 alive, of 2 nodes" {
		t.Errorf("none is gone: %+v", f)
	}
	delete(s.Nodes, "node-1")
	if f := agents(check.Finding{Level: check.OK}, *s); f.Level != check.Warning || !strings.HasSuffix(f.Found, "of the node: node-1") || f.Consequence == "" {
		t.Errorf("node-1 is gone: %+v", f)
	}
}
