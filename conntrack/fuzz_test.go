package conntrack

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// What an event says is what decode reads of its attributes, whatever the bytes are, and nothing of it makes the agent
// fall.
func FuzzEvents(f *testing.F) {
	nested := func(typ byte, value ...byte) []byte {
		return append([]byte{byte(4 + len(value)), 0, typ, 0x80}, value...)
	}
	for _, attributes := range [][]byte{
		nil, {4, 0, tupleOrig, 0}, {3, 0, 1, 0}, {8, 0, entryID, 0, 0, 0, 0, 7}, {255, 255, 1, 0}, nested(tupleReply, nested(1, 5, 0, 1, 0, 10, 0, 0, 0)...),
		nested(protoInfo, nested(tcpInfo, 5, 0, tcpState, 0, timeWait, 0, 0, 0)...), nested(timestamps, 12, 0, timestampStart, 0, 255, 255, 255, 255, 255, 255, 255, 255),
	} {
		f.Add(attributes)
	}
	f.Fuzz(func(t *testing.T, attributes []byte) {
		var c Count
		_ = decodeCount(attributes, &c) // no more than an error
		var want Flow
		err := decode(attributes, &want)
		size := unix.NLMSG_HDRLEN + headerLen + len(attributes)
		if size > 1<<16 {
			return
		}
		header := make([]byte, unix.NLMSG_HDRLEN+headerLen)
		header[0], header[1], header[4], header[5] = byte(size), byte(size>>8), byte(begin&0xff), byte(begin>>8)
		var got []Flow
		var flow Flow
		keep := func(f *Flow) { got = append(got, *f) }
		gotErr := new(Events).parse(bytes.Join([][]byte{header, attributes}, nil), &flow, keep, keep)
		if (err == nil) != (gotErr == nil) || err == nil && (len(got) != 1 || got[0] != want) {
			t.Errorf("the attributes are %+v, %v; the event is %+v, %v", want, err, got, gotErr)
		}
		// the first of a listing is that message, however much comes after it
		if first, found, err := head(bytes.Join([][]byte{header, attributes, attributes}, nil)); (err == nil) != (gotErr == nil) || err == nil && (!found || first != want) {
			t.Errorf("the attributes are %+v; the first message is %+v, %v, %v", want, first, found, err)
		}
		_, _, _ = head(attributes)
		_ = new(Events).parse(attributes, &flow, keep, keep) // as a datagram: no more than an error may come of it
	})
}
