// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/binary"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/spdystream/spdy"
)

// A frame that cannot be parsed ends the session and does not pass.
func TestSPDY_RejectsInvalidFrames(t *testing.T) {
	raw := func(version, kind uint16, payload string) string {
		b := binary.BigEndian.AppendUint16(nil, 0x8000|version)
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
		return string(b) + payload
	}
	// All headers are compressed as one stream, so a frame depends on those before.
	again := strings.TrimPrefix(spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(5, "stdin")), spdyControl(t, syn(1, "error"), syn(3, "stdin")))
	once := spdyControl(t, syn(1, "error"), syn(3, "stdin"))
	twice := strings.TrimPrefix(spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(1, "stdout")), once)
	huge := strings.Repeat("x", maxHeaderSize+1)
	crowded := http.Header{"streamtype": {"stdout"}}
	for i := range maxHeaderCount {
		crowded["h"+strconv.Itoa(i)] = []string{"x"}
	}
	// A stream number has 31 bits. In the first bytes of a frame, the 32nd bit marks a
	// control frame.
	unnameable := []byte(spdyControl(t, syn(5, "stdout")))
	unnameable[spdyHeader] |= 0x80
	for _, tt := range []invalid{
		{name: "client data on an unopened stream", clientBefore: opening(t), client: spdyFrame(11, "x"), mention: "unknown stream 11"},
		{name: "server data on an unopened stream", clientBefore: opening(t), serverBefore: spdyFrame(5, "x"), server: spdyFrame(11, "x"), mention: "unknown stream 11"},
		{name: "data before any stream was opened", server: spdyFrame(1, "x"), mention: "unknown stream 1"},
		// Tailscale's parser reads only the last seven bits of a stream number.
		{name: "a stream number that ends like an open one", clientBefore: opening(t), server: spdyFrame(5+128, "x"), mention: "unknown stream 133"},
		{name: "a stream of an unknown type", client: spdyControl(t, syn(1, "sideband")), mention: `"sideband"`},
		{name: "a stream without a type", client: spdyControl(t, &spdy.SynStreamFrame{StreamId: 1, Headers: http.Header{}}), mention: `unknown type ""`},
		{name: "a stream opened twice", clientBefore: once, client: twice, mention: "stream 1 is opened twice"},
		{name: "a header that is too long", client: spdyControl(t, syn(1, huge)), mention: "cannot be read"},
		{name: "too many headers", client: spdyControl(t, &spdy.SynStreamFrame{StreamId: 1, Headers: crowded}), mention: "cannot be read"},
		{name: "a stream number of 32 bits", client: string(unnameable), mention: "no frame can name"},
		{name: "a second stream of a type", clientBefore: once, client: again, mention: `second stream of the type "stdin"`},
		{name: "a stream opened by the server", clientBefore: opening(t), server: spdyControl(t, syn(2, "stdout")), mention: "opened"},
		{name: "another version", client: raw(2, 6, "\x00\x00\x00\x01"), mention: "version 2"},
		{name: "an unknown control frame", client: raw(3, 77, ""), mention: "cannot be read"},
		{name: "a control frame with another one inside", client: raw(3, 6, "\x00\x00\x00\x01"+spdyFrame(5, "")), mention: "longer"},
		{name: "a control frame that is too short", client: raw(3, 1, "\x00\x00"), mention: "cannot be read"},
		{name: "uncompressed headers", client: raw(3, 1, strings.Repeat("\x00", 40)), mention: "cannot be read"},
		{name: "not SPDY", client: "GET / HTTP/1.1\r\n\r\n", mention: "limit"},
		{name: "a frame that is too long", client: "\x00\x00\x00\x01\x00\x10\x00\x01", mention: "a frame of 1048577 bytes, where 1048576 are the limit"},
		{name: "a frame of the server that is too long", clientBefore: opening(t), server: "\x00\x00\x00\x01\x00\x10\x00\x01", mention: "limit"},
		{name: "a frame that is as long as can be", client: "\x00\x00\x00\x01\x00\x10\x00\x00" + strings.Repeat("x", 1<<20), mention: "unknown stream"},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.check(t, spdyStreams(newNoted())) })
	}
}
