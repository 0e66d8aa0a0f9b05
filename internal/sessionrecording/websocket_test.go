// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"strings"
	"testing"
)

// A frame that cannot be parsed ends the session and does not pass.
func TestWebSocket_RejectsInvalidFrames(t *testing.T) {
	for _, tt := range []invalid{
		{name: "an unknown channel from the client", clientBefore: wsClient("\x00x"), client: wsClient("\x05x"), mention: "channel 5"},
		{name: "an unknown channel from the server", serverBefore: wsServer("\x01x"), server: wsServer("\x05x"), mention: "channel 5"},
		{name: "the server closes a channel", server: wsServer("\xff\x01"), mention: "channel 255"},
		{name: "an unknown channel in a fragmented message", serverBefore: ws(opBinary, false, ""), server: ws(0x80|opContinuation, false, "\x07x"), mention: "channel 7"},
		{name: "a digit as the channel", server: wsServer("1x"), mention: "channel 49"},
		{name: "a fragmented client message", client: ws(opBinary, true, "\x00x"), mention: "in parts"},
		{name: "a continuation of a client message", client: ws(0x80|opContinuation, true, "\x04{}"), mention: "in parts"},
		{name: "compressed", server: ws(0x80|0x40|opBinary, false, "\x01x"), mention: "reserved"},
		{name: "an unknown opcode", server: ws(0x80|3, false, "\x01x"), mention: "opcode 3"},
		{name: "an unknown control opcode", server: ws(0x80|11, false, "x"), mention: "opcode 11"},
		{name: "a continuation of no message", server: ws(0x80|opContinuation, false, "x"), mention: "continues no message"},
		{name: "a message within another", serverBefore: ws(opBinary, false, "\x01x"), server: wsServer("\x01x"), mention: "within another"},
		{name: "an unmasked client frame", client: wsServer("\x00x"), mention: "masked"},
		{name: "a masked server frame", server: wsClient("\x01x"), mention: "masked"},
		{name: "a fragmented control frame", client: ws(opPing, true, "x"), mention: "control frame"},
		{name: "a control frame that is too long", client: ws(0x80|opPing, true, strings.Repeat("x", 126)), mention: "control frame"},
		{name: "a frame that is too long", server: string([]byte{0x82, 127, 0, 0, 0, 0, 0, 16, 0, 1}), mention: "a frame of 1048577 bytes, where 1048576 are the limit"},
		{name: "a frame of the maximum length", server: string([]byte{0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}), mention: "limit"},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.check(t, binaryChannels(newNoted())) })
	}
	for _, tt := range []invalid{
		{name: "a byte as the channel in base64", server: wsServer("\x01x"), mention: "channel"},
		{name: "invalid base64", server: wsServer("1***"), mention: "base64"},
		{name: "a fragmented base64 message", serverBefore: ws(opText, false, "1eA=="), server: ws(0x80|opContinuation, false, "eA=="), mention: "in parts"},
	} {
		t.Run("base64/"+tt.name, func(t *testing.T) { tt.check(t, base64Session(newNoted())) })
	}
}

// Only version 5 has messages that close a channel.
func TestWebSocket_OnlyNewestVersionClosesChannels(t *testing.T) {
	for version, closes := range map[string]bool{"v4.channel.k8s.io": false, "v5.channel.k8s.io": true} {
		p, err := newTerminal(false, nil).protocol(websocketUpgrade, version)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.fromClient([]byte(wsClient("\xff\x00"))); (err == nil) != closes {
			t.Errorf("%s: got error %v; want one: %v", version, err, !closes)
		}
	}
}
