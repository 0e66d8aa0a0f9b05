// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream/spdy"
)

// noted is an observer that keeps what it receives.
type noted struct {
	streams []string
	client  map[stream]string
	server  map[stream]string
}

func newNoted() *noted {
	return &noted{client: make(map[stream]string), server: make(map[stream]string)}
}

func (n *noted) streamOpened(h streamHeader) (stream, error) {
	s, err := new(terminal).streamOpened(h)
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

// ws returns a frame of a WebSocket. Frames from a client are masked.
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

// wsClient and wsServer return a message in one frame.
func wsClient(payload string) string { return ws(0x80|opBinary, true, payload) }
func wsServer(payload string) string { return ws(0x80|opBinary, false, payload) }

// spdyControl returns control frames, encoded by spdystream.
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

// syn returns a frame that opens a stream.
func syn(id spdy.StreamId, what string) spdy.Frame {
	return &spdy.SynStreamFrame{StreamId: id, Headers: http.Header{"streamtype": {what}}}
}

// spdyFrame returns a data frame.
func spdyFrame(id uint32, payload string) string {
	return string(appendSPDY(nil, id, 0, []byte(payload)))
}

// opening opens the streams of kubectl exec -it, in the order of kubectl.
func opening(t *testing.T) string {
	return spdyControl(t, syn(1, "error"), syn(3, "stdin"), syn(5, "stdout"), syn(7, "stderr"), syn(9, "resize"), &spdy.PingFrame{Id: 1})
}

// conversation is the data of a connection, and what a protocol finds in it.
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

// However the data is split, each frame is found once, and all of it passes unchanged.
func TestFilter_FramesInAnyPieces(t *testing.T) {
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
						t.Errorf("from the %s: %d bytes passed, or others; want the %d that arrived", way.what, passed.Len(), len(way.sent))
					}
				}
				if diff := cmp.Diff(c.want, *got, cmp.AllowUnexported(noted{})); diff != "" {
					t.Errorf("found (-want +got):\n%.2000s", diff)
				}
			})
		}
	}
}

// No part of an incomplete frame passes, so that the farewell is never written within
// a frame.
func TestFilter_PassesOnlyWholeFrames(t *testing.T) {
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
					t.Fatalf("%s, %s: %d bytes passed, which is within a frame", c.name, what, passed)
				}
			}
		}
	}
}

// frameLength returns the length of the frame at the start of b.
func frameLength(protocol, b string) (int, error) {
	if protocol == "SPDY" {
		return spdyLength([]byte(b))
	}
	f, err := parseWSFrame([]byte(b))
	return f.length, err
}

// FuzzFrames checks that the parsers do not panic, and that what passes is the start of
// what arrived.
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

// invalid is a frame that a protocol has to reject, from the client or from the server,
// after valid frames.
type invalid struct {
	name                 string
	clientBefore, client string
	serverBefore, server string
	mention              string // in the error
}

// check checks that the frame is an error and does not pass, and that the frames before
// it do.
func (tt invalid) check(t *testing.T, p protocol) {
	rejects := func(f *filter, before, bad string) {
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
		rejects(&client, tt.clientBefore, tt.client)
		return
	}
	if _, err := client.push([]byte(tt.clientBefore)); err != nil {
		t.Fatal(err)
	}
	rejects(&server, tt.serverBefore, tt.server)
}
