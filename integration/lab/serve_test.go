package lab

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
)

func TestAnEchoServerHoldsTheDatagramsOfTwoSecondsUnread(t *testing.T) {
	need.Root(t)
	loopback := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0)
	server, err := listenUDP(loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	raw, err := server.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var size int
	var failed error
	if err := raw.Control(func(fd uintptr) { size, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	if size != 2*echoBuffer { // socket(7): the kernel doubles it
		t.Errorf("the receive buffer has %d bytes, want %d", size, 2*echoBuffer)
	}

	client, err := listenUDP(loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	const sent = 20000 // of 10 probes of 1 ms in two seconds
	to := server.LocalAddr().String()
	for range sent {
		if _, err := client.WriteToUDPAddrPort(make([]byte, 8), netip.MustParseAddrPort(to)); err != nil {
			t.Fatal(err)
		}
	}
	got, buf := 0, make([]byte, 16)
	if err := raw.Read(func(fd uintptr) bool {
		for {
			if _, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); err != nil {
				return true // EAGAIN: all are read
			}
			got++
		}
	}); err != nil {
		t.Fatal(err)
	}
	if got != sent {
		t.Errorf("%d of %d datagrams that came while nobody read are there", got, sent)
	}
}
