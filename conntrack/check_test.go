package conntrack

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

func TestAKernelThatTellsOfNoConnectionsIsNamed(t *testing.T) {
	netns.Enter(t)
	if err := Check(); err != nil {
		t.Errorf("this kernel: %v", err)
	}
	const unknown = unix.NFNL_SUBSYS_CTNETLINK<<8 | 0xff // no kernel answers it, as one without answers none
	if err := check(unknown); err == nil || !strings.Contains(err.Error(), "CONFIG_NF_CT_NETLINK") {
		t.Errorf("error %v, want one that names what is missing", err)
	}
}
