// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream/spdy"
)

// noted is an observer that keeps what it is told.
type noted struct {
	streams []string
	client  map[stream]string
	server  map[stream]string
}

func newNoted() *noted {
	return &noted{client: make(map[stream]string), server: make(map[stream]string)}
}

func (n *noted) opened(h streamHeader) (stream, error) {
	s, err := (*terminal)(nil).opened(h)
	n.streams = append(n.streams, string(s))
	return s, err
}

func (n *noted) fromClient(s stream, p []byte) error {
	n.client[s] += string(p)
	return nil
}

func (n *noted) fromServer(s stream, p []byte) error {
	n.server[s] += string(p)
	return nil
}

// ws returns a frame of a WebSocket. What a client sends is masked.
func ws(first byte, fromClient bool, payload string) string {
	b := []byte{first}
	mask := byte(0)
	if fromClient {
		mask = 0x80
	}
	switch {
	case len(payload) < 126:
		b = append(b, mask|byte(len(payload)))
	case len(payload) < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, mask|126), uint16(len(payload)))
	default:
		b = binary.BigEndian.AppendUint64(append(b, mask|127), uint64(len(payload)))
	}
	if !fromClient {
		return string(b) + payload
	}
	key := []byte{1, 2, 3, 4}
	b = append(b, key...)
	for i := range len(payload) {
		b = append(b, payload[i]^key[i&3])
	}
	return string(b)
}

// wsClient and wsServer return a whole message.
func wsClient(payload string) string { return ws(0x80|opBinary, true, payload) }
func wsServer(payload string) string { return ws(0x80|opBinary, false, payload) }

// spdyControl returns control frames as spdystream writes them.
func spdyControl(t *testing.T, frames ...spdy.Frame) string {
	t.Helper()
	var b bytes.Buffer
	framer, err := spdy.NewFramer(&b, &b)
	if err != nil {
		t.Fatal(err)
	}
	for _, frame := range frames {
		if err := framer.WriteFrame(frame); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func syn(id spdy.StreamId, what string) spdy.Frame {
	return &spdy.SynStreamFrame{StreamId: id, Headers: http.Header{"streamtype": {what}}}
}

func spdyFrame(id uint32, payload string) string {
	return string(appendSPDY(nil, id, 0, []byte(payload)))
}

// opening opens the streams of kubectl exec -it, in the order in which it does.
func opening(t *testing.T) string {
	return spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(5, "stdout"), syn(7, "stderr"), syn(9, "resize"), &spdy.PingFrame{Id: 1})
}

// conversation is what is said on a connection, and what is to be found in it.
type conversation struct {
	name           string
	protocol       func(o observer) protocol
	client, server string
	want           noted
}

func binaryChannels(o observer) protocol {
	return &webSocket{observer: o, closes: true, status: true, channel: sessionChannels, out: 1, errors: 3}
}

func base64Session(o observer) protocol {
	return &webSocket{observer: o, base64: true, status: true, channel: sessionChannels, out: 2, errors: 3}
}

func spdyStreams(o observer) protocol {
	s, err := newSPDY(o)
	if err != nil {
		panic(err)
	}
	s.out, s.status = stdout, true
	return s
}

func conversations(t *testing.T) []conversation {
	big := strings.Repeat("0123456789abcdef", 5000)
	b64 := base64.StdEncoding.EncodeToString
	return []conversation{
		{
			"SPDY", spdyStreams,
			opening(t) + spdyFrame(9, `{"Width":120,"Height":40}`+"\n") + spdyFrame(3, "ls\n") + spdyFrame(3, "") + spdyControl(t, &spdy.GoAwayFrame{}),
			spdyControl(t, &spdy.SynReplyFrame{StreamId: 1}, &spdy.SynReplyFrame{StreamId: 5}) +
				spdyFrame(5, "one ") + spdyFrame(7, "two ") + spdyFrame(5, big) + spdyFrame(1, "{}") + string(appendSPDY(nil, 5, flagFin, nil)),
			noted{
				[]string{"error", "stdin", "stdout", "stderr", "resize"},
				map[stream]string{resize: `{"Width":120,"Height":40}` + "\n", stdin: "ls\n"},
				map[stream]string{stdout: "one " + big, stderr: "two ", errs: "{}"},
			},
		},
		{
			"WebSocket", binaryChannels,
			wsClient("\x04{\"Width\":120,") + wsClient("\x04\"Height\":40}") + wsClient("\x00ls\n") + ws(0x80|opPing, true, "x") + wsClient("\xff\x00") + wsClient(""),
			wsServer("\x00") + wsServer("\x01") + wsServer("\x01one ") + wsServer("\x02two ") + ws(0x80|opPong, false, "x") +
				ws(opBinary, false, "\x01"+big[:10]) + ws(opContinuation, false, "") + ws(0x80|opPing, false, "") + ws(opContinuation, false, big[10:70000]) + ws(0x80|opContinuation, false, big[70000:]) +
				wsServer("\x03{}") + ws(0x80|opClose, false, "\x03\xe8"),
			noted{
				nil,
				map[stream]string{resize: `{"Width":120,"Height":40}`},
				map[stream]string{stdin: "", stdout: "one " + big, stderr: "two ", errs: "{}"},
			},
		},
		{
			"WebSocket in base64", base64Session,
			ws(0x80|opText, true, "4"+b64([]byte(`{"Width":1,"Height":2}`))) + ws(0x80|opText, true, "0"+b64([]byte("ls\n"))),
			ws(0x80|opText, false, "1") + ws(0x80|opText, false, "1"+b64([]byte("one "))) + ws(0x80|opText, false, "2"+b64([]byte("two"))) + ws(0x80|opText, false, "1"+b64([]byte(big))),
			noted{
				nil,
				map[stream]string{resize: `{"Width":1,"Height":2}`},
				map[stream]string{stdout: "one " + big, stderr: "two"},
			},
		},
	}
}

// pieces cuts s into pieces of the given sizes, over and over.
func pieces(s string, size func() int) []string {
	var all []string
	for len(s) > 0 {
		n := min(size(), len(s))
		all, s = append(all, s[:n]), s[n:]
	}
	return all
}

// However frames are split and put together, each is found, once, and what passes
// is what came.
func TestFramesInAnyPieces(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	sizes := map[string]func() int{
		"one by one": func() int { return 1 },
		"two by two": func() int { return 2 },
		"sevens":     func() int { return 7 },
		"at random":  func() int { return 1 + random.IntN(300) },
		"large":      func() int { return 33000 },
		"all at once": func() int {
			return 1 << 30
		},
	}
	for _, c := range conversations(t) {
		for name, size := range sizes {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				got := newNoted()
				p := c.protocol(got)
				for _, way := range []struct {
					what, sent string
					next       func([]byte) (int, error)
				}{{"client", c.client, p.fromClient}, {"server", c.server, p.fromServer}} {
					f := filter{next: way.next}
					var passed strings.Builder
					for _, piece := range pieces(way.sent, size) {
						pass, err := f.push([]byte(piece))
						if err != nil {
							t.Fatalf("from the %s: %v", way.what, err)
						}
						passed.Write(pass)
					}
					if passed.String() != way.sent {
						t.Errorf("from the %s: %d bytes passed, or others; want the %d that came", way.what, passed.Len(), len(way.sent))
					}
				}
				if diff := cmp.Diff(c.want, *got, cmp.AllowUnexported(noted{})); diff != "" {
					t.Errorf("what was found (-want +got):\n%.2000s", diff)
				}
			})
		}
	}
}

// Of a frame that is not complete nothing passes, so that what the proxy says at the
// end of a session does not land in the midst of one.
func TestOnlyWholeFramesPass(t *testing.T) {
	for _, c := range conversations(t) {
		for what, sent := range map[string]string{"client": c.client, "server": c.server} {
			p := c.protocol(newNoted())
			next := p.fromClient
			if what == "server" {
				if _, err := (&filter{next: p.fromClient}).push([]byte(c.client)); err != nil {
					t.Fatal(err)
				}
				next = p.fromServer
			}
			borders := map[int]bool{0: true}
			for at := 0; at < len(sent); {
				n, _ := frameLength(c.name, sent[at:])
				at += n
				borders[at] = true
			}
			f := filter{next: next}
			passed := 0
			for i := range len(sent) {
				pass, err := f.push([]byte{sent[i]})
				if err != nil {
					t.Fatal(err)
				}
				passed += len(pass)
				if !borders[passed] {
					t.Fatalf("%s, %s: %d bytes have passed, which is in the midst of a frame", c.name, what, passed)
				}
			}
		}
	}
}

func frameLength(protocol, b string) (int, error) {
	if protocol == "SPDY" {
		return spdyLength([]byte(b)), nil
	}
	f, err := parseWSFrame([]byte(b))
	return f.length, err
}

// What cannot be understood ends the session and does not pass, the frames before it
// do.
func TestFramesThatCannotBeUnderstood(t *testing.T) {
	raw := func(version, kind uint16, payload string) string {
		b := binary.BigEndian.AppendUint16(nil, 0x8000|version)
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
		return string(b) + payload
	}
	// Headers are compressed as one, so the last frame follows from those before.
	again := strings.TrimPrefix(spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(5, "stdin")), spdyControl(t, syn(1, "error"), syn(3, "stdin")))
	once := spdyControl(t, syn(1, "error"), syn(3, "stdin"))
	twice := strings.TrimPrefix(spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(1, "stdout")), once)
	huge := strings.Repeat("x", maxHeaderSize+1)
	crowded := http.Header{"streamtype": {"stdout"}}
	for i := range maxHeaderCount {
		crowded["h"+strconv.Itoa(i)] = []string{"x"}
	}
	// The number of a stream has 31 bits. What would be the 32nd says what a frame is.
	unnameable := []byte(spdyControl(t, syn(5, "stdout")))
	unnameable[spdyHeader] |= 0x80
	for _, tt := range []struct {
		name                 string
		protocol             func(o observer) protocol
		clientBefore, client string
		serverBefore, server string
		mention              string
	}{
		{name: "SPDY: data from the client on a stream that was not opened", protocol: spdyStreams, clientBefore: opening(t), client: spdyFrame(11, "x"), mention: "unknown stream 11"},
		{name: "SPDY: data from the server on a stream that was not opened", protocol: spdyStreams, clientBefore: opening(t), serverBefore: spdyFrame(5, "x"), server: spdyFrame(11, "x"), mention: "unknown stream 11"},
		{name: "SPDY: before any was opened", protocol: spdyStreams, server: spdyFrame(1, "x"), mention: "unknown stream 1"},
		// Of the number of a stream, Tailscale's parser sees the last seven bits.
		{name: "SPDY: a stream whose number ends like another's", protocol: spdyStreams, clientBefore: opening(t), server: spdyFrame(5+128, "x"), mention: "unknown stream 133"},
		{name: "SPDY: a stream of an unknown type", protocol: spdyStreams, client: spdyControl(t, syn(1, "sideband")), mention: `"sideband"`},
		{name: "SPDY: a stream without a type", protocol: spdyStreams, client: spdyControl(t, &spdy.SynStreamFrame{StreamId: 1, Headers: http.Header{}}), mention: `unknown type ""`},
		{name: "SPDY: a stream that is opened twice", protocol: spdyStreams, clientBefore: once, client: twice, mention: "stream 1 is opened twice"},
		{name: "SPDY: headers that are too long", protocol: spdyStreams, client: spdyControl(t, syn(1, huge)), mention: "cannot be read"},
		{name: "SPDY: more headers than a stream has", protocol: spdyStreams, client: spdyControl(t, &spdy.SynStreamFrame{StreamId: 1, Headers: crowded}), mention: "cannot be read"},
		{name: "SPDY: a stream with a number that no data can have", protocol: spdyStreams, client: string(unnameable), mention: "no frame can name"},
		{name: "SPDY: a second stream of a type", protocol: spdyStreams, clientBefore: once, client: again, mention: `second stream of the type "stdin"`},
		{name: "SPDY: a stream that the server opens", protocol: spdyStreams, clientBefore: opening(t), server: spdyControl(t, syn(2, "stdout")), mention: "opened"},
		{name: "SPDY: another version", protocol: spdyStreams, client: raw(2, 6, "\x00\x00\x00\x01"), mention: "version 2"},
		{name: "SPDY: an unknown control frame", protocol: spdyStreams, client: raw(3, 77, ""), mention: "cannot be read"},
		{name: "SPDY: a control frame with another inside", protocol: spdyStreams, client: raw(3, 6, "\x00\x00\x00\x01"+spdyFrame(5, "")), mention: "longer"},
		{name: "SPDY: a control frame that is too short", protocol: spdyStreams, client: raw(3, 1, "\x00\x00"), mention: "cannot be read"},
		{name: "SPDY: headers that are not compressed", protocol: spdyStreams, client: raw(3, 1, strings.Repeat("\x00", 40)), mention: "cannot be read"},
		{name: "SPDY: not SPDY", protocol: spdyStreams, client: "GET / HTTP/1.1\r\n\r\n" + strings.Repeat("x", 1<<24), mention: "unknown stream"},

		{name: "WebSocket: an unknown channel from the client", protocol: binaryChannels, clientBefore: wsClient("\x00x"), client: wsClient("\x05x"), mention: "channel 5"},
		{name: "WebSocket: an unknown channel from the server", protocol: binaryChannels, serverBefore: wsServer("\x01x"), server: wsServer("\x05x"), mention: "channel 5"},
		{name: "WebSocket: the server closes a channel", protocol: binaryChannels, server: wsServer("\xff\x01"), mention: "channel 255"},
		{name: "WebSocket: an unknown channel in parts", protocol: binaryChannels, serverBefore: ws(opBinary, false, ""), server: ws(0x80|opContinuation, false, "\x07x"), mention: "channel 7"},
		{name: "WebSocket: a channel's digit where bytes are spoken", protocol: binaryChannels, server: wsServer("1x"), mention: "channel 49"},
		{name: "WebSocket: a channel's byte where digits are spoken", protocol: base64Session, server: wsServer("\x01x"), mention: "channel"},
		{name: "WebSocket: no base64", protocol: base64Session, server: wsServer("1***"), mention: "base64"},
		{name: "WebSocket: base64 in parts", protocol: base64Session, serverBefore: ws(opText, false, "1eA=="), server: ws(0x80|opContinuation, false, "eA=="), mention: "in parts"},
		{name: "WebSocket: a message of the client in parts", protocol: binaryChannels, client: ws(opBinary, true, "\x00x"), mention: "in parts"},
		{name: "WebSocket: the rest of a message of the client", protocol: binaryChannels, client: ws(0x80|opContinuation, true, "\x04{}"), mention: "in parts"},
		{name: "WebSocket: compressed", protocol: binaryChannels, server: ws(0x80|0x40|opBinary, false, "\x01x"), mention: "reserved"},
		{name: "WebSocket: an unknown opcode", protocol: binaryChannels, server: ws(0x80|3, false, "\x01x"), mention: "opcode 3"},
		{name: "WebSocket: an unknown control opcode", protocol: binaryChannels, server: ws(0x80|11, false, "x"), mention: "opcode 11"},
		{name: "WebSocket: the rest of nothing", protocol: binaryChannels, server: ws(0x80|opContinuation, false, "x"), mention: "continues no message"},
		{name: "WebSocket: a message in another", protocol: binaryChannels, serverBefore: ws(opBinary, false, "\x01x"), server: wsServer("\x01x"), mention: "within another"},
		{name: "WebSocket: a client that does not mask", protocol: binaryChannels, client: wsServer("\x00x"), mention: "masked"},
		{name: "WebSocket: a server that masks", protocol: binaryChannels, server: wsClient("\x01x"), mention: "masked"},
		{name: "WebSocket: a control frame in parts", protocol: binaryChannels, client: ws(opPing, true, "x"), mention: "control frame"},
		{name: "WebSocket: a control frame that is too long", protocol: binaryChannels, client: ws(0x80|opPing, true, strings.Repeat("x", 126)), mention: "control frame"},
		{name: "WebSocket: a frame that is too long", protocol: binaryChannels, server: string([]byte{0x82, 127, 0, 0, 0, 0, 2, 0, 0, 0}), mention: "limit"},
		{name: "WebSocket: a frame without end", protocol: binaryChannels, server: string([]byte{0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}), mention: "limit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.protocol(newNoted())
			fail := func(f *filter, before, bad string) {
				t.Helper()
				pass, err := f.push([]byte(before + bad))
				if err == nil {
					t.Fatal("got no error; want one")
				}
				if string(pass) != before {
					t.Errorf("%d bytes passed; want the %d before", len(pass), len(before))
				}
				if !strings.Contains(err.Error(), tt.mention) {
					t.Errorf("got error %q; want one that mentions %q", err, tt.mention)
				}
			}
			client, server := filter{next: p.fromClient}, filter{next: p.fromServer}
			if tt.client != "" {
				fail(&client, tt.clientBefore, tt.client)
				return
			}
			if _, err := client.push([]byte(tt.clientBefore)); err != nil {
				t.Fatal(err)
			}
			fail(&server, tt.serverBefore, tt.server)
		})
	}
}

// FuzzFrames checks that frames of any content neither break the parsers nor let
// anything pass that they were not asked about.
func FuzzFrames(f *testing.F) {
	f.Add([]byte(wsServer("\x01x")+ws(opBinary, false, "\x01")), uint8(3))
	f.Add([]byte(wsClient("\x04{}")), uint8(1))
	f.Add([]byte(spdyFrame(5, "x")), uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		for name, make := range map[string]func(o observer) protocol{"SPDY": spdyStreams, "WebSocket": binaryChannels, "base64": base64Session} {
			p := make(newNoted())
			for way, next := range map[string]func([]byte) (int, error){"client": p.fromClient, "server": p.fromServer} {
				var passed []byte
				filter := filter{next: next}
				for _, piece := range pieces(string(b), func() int { return int(size) + 1 }) {
					pass, err := filter.push([]byte(piece))
					passed = append(passed, pass...)
					if err != nil {
						break
					}
				}
				if !bytes.HasPrefix(b, passed) {
					t.Errorf("%s, from the %s: %x passed of %x", name, way, passed, b)
				}
			}
		}
	})
}

// What the proxy says at the end of a session arrives as kubectl expects it.
func TestFarewell(t *testing.T) {
	const reason = "the recorder was lost"
	for _, c := range conversations(t) {
		t.Run(c.name, func(t *testing.T) {
			p := c.protocol(newNoted())
			if _, err := (&filter{next: p.fromClient}).push([]byte(c.client)); err != nil {
				t.Fatal(err)
			}
			got := newNoted()
			reader := c.protocol(got)
			if _, err := (&filter{next: reader.fromClient}).push([]byte(c.client)); err != nil {
				t.Fatal(err)
			}
			f := filter{next: reader.fromServer}
			farewell := p.farewell(reason)
			if pass, err := f.push(farewell); err != nil || len(pass) != len(farewell) {
				t.Fatalf("%d of %d bytes are frames: %v", len(pass), len(farewell), err)
			}
			terminal := got.server[stdout] + got.server[stderr]
			if want := "\r\n" + reason + "\r\n"; terminal != want {
				t.Errorf("on the terminal: %q; want %q", terminal, want)
			}
			want := `{"metadata":{},"status":"Failure","message":"the recorder was lost","reason":"Forbidden"}`
			if got.server[errs] != want {
				t.Errorf("on the error stream: %s; want %s", got.server[errs], want)
			}
		})
	}
}

// In the midst of a message nothing can be said.
func TestNoFarewellWithinAMessage(t *testing.T) {
	p := binaryChannels(newNoted())
	if _, err := (&filter{next: p.fromServer}).push([]byte(ws(opBinary, false, "\x01x"))); err != nil {
		t.Fatal(err)
	}
	if got := p.farewell("x"); len(got) > 0 {
		t.Errorf("got %q; want nothing", got)
	}
}
